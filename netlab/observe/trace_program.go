package observe

import (
	"encoding/binary"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Names of the maps.
const (
	mapHosts   = "hosts"   // inode number of a namespace → its host's index
	mapCounts  = "counts"  // countKey → how often
	mapSockets = "sockets" // address of a struct sock → what is kept of it
	mapStays   = "stays"   // index of host, state and next state → stayValue
	mapLost    = "lost"    // index of an event → how many of them found a map full
)

// traceLimits are the sizes of the maps that can be found full. Both are allocated at
// the start.
type traceLimits struct{ counts, sockets uint32 }

// defaultLimits take some 15 MB together. A larger table of sockets would cost every
// connection more: it would be in no cache.
var defaultLimits = traceLimits{counts: 1 << 16, sockets: 1 << 16}

// stackFrames is how much of a kernel stack is kept, innermost first. The first few
// frames belong to the tracepoint and to the program itself. Deeper ones would not
// tell more: a packet comes in on top of whatever its CPU was doing.
const stackFrames = 13

// countKey is what an event is counted under; the order of its fields is that of
// the key* constants. Addresses are as in the packet.
type countKey struct {
	Local, Remote [4]byte
	Reason        uint32
	Host          uint16
	Event, State  uint8
	Stack         [stackFrames]uint64
}

const (
	keyLocal  = 0
	keyRemote = 4
	keyReason = 8
	keyHost   = 12
	keyEvent  = 14
	keyState  = 15
	keyStack  = 16
	keySize   = keyStack + 8*stackFrames
)

// What is kept of a socket: since when it has been in its state, by CLOCK_MONOTONIC, the
// state, and the index of its host.
const (
	socketSinceAt = 0
	socketStateAt = 8
	socketHostAt  = 12
	socketSize    = 16
)

// stayBuckets are the powers of 2 in nanoseconds that stays are told apart by: up to
// 18 minutes.
const stayBuckets = 40

// stayValue is the account of the stays in one state before one other.
type stayValue struct {
	Count, Total, Longest uint64
	Buckets               [stayBuckets]uint64
}

const stayBucketsAt = 24

// stayIndex is an index of the map of stays.
func stayIndex(host int, state, next State) uint32 {
	return uint32((host*stayStates+int(state))*stayStates + int(next))
}

// stayStates is room for every state, as a power of 2.
const stayStates = 16

// The programs' stack frame, from its pointer downwards.
const (
	frameKey     = -keySize
	frameSock    = frameKey - maxPiece
	frameSkb     = frameSock - maxPiece
	frameIP      = frameSkb - 24
	frameScratch = frameIP - 16
)

// traceSpec are the programs and maps for a number of hosts on a kernel.
//
// They are raw tracepoint programs, which get the tracepoint's arguments as numbers
// and read memory by bpf_probe_read_kernel only: a pointer that is NULL, or is not one
// at all because its place in a union holds something else, makes a read that fails,
// on every kernel. Programs with BTF types would read for less, but older kernels take
// it that no such argument is NULL and leave out the test for it; the socket of a reset
// without a socket is.
func traceSpec(k *kernelLayout, hosts int, stays States, limits traceLimits) *ebpf.CollectionSpec {
	spec := &ebpf.CollectionSpec{
		Maps: map[string]*ebpf.MapSpec{
			mapHosts:   {Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: uint32(hosts)},
			mapCounts:  {Type: ebpf.Hash, KeySize: keySize, ValueSize: 8, MaxEntries: limits.counts},
			mapSockets: {Type: ebpf.Hash, KeySize: 8, ValueSize: socketSize, MaxEntries: limits.sockets},
			mapStays:   {Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: stayBucketsAt + 8*stayBuckets, MaxEntries: uint32(hosts * stayStates * stayStates)},
			mapLost:    {Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: uint32(len(tracedEvents))},
		},
		Programs: map[string]*ebpf.ProgramSpec{},
	}
	for name, m := range spec.Maps {
		m.Name = name
	}
	programs := map[string]*program{
		eventSendReset:        sendReset(k),
		eventReceiveReset:     socketEvent(k, eventReceiveReset),
		eventRetransmit:       socketEvent(k, eventRetransmit),
		eventRetransmitSynAck: socketEvent(k, eventRetransmitSynAck),
		eventDrop:             drop(k),
		eventState:            stateChange(k, stays),
	}
	for event, p := range programs {
		spec.Programs[event] = &ebpf.ProgramSpec{Name: "connlab_trace", Type: ebpf.RawTracepoint, Instructions: p.finish(), License: "GPL"}
	}
	return spec
}

// Registers that keep their values over calls.
const (
	rContext = asm.R6
	rSock    = asm.R7
	rSkb     = asm.R8
	rSaved   = asm.R9
)

// Where every program ends: nothing to count; something to count that cannot be.
const (
	labelOut  = "out"
	labelLost = "lost"
)

// program is one while it is written.
type program struct {
	k     *kernelLayout
	name  string
	event eventLayout
	code  asm.Instructions
	label string // of the next instruction
}

// newProgram begins a program with its arguments in registers; rSock is the request
// where the event has one, and 0 where it has neither.
func newProgram(k *kernelLayout, event string) *program {
	p := &program{k: k, name: event, event: k.events[event]}
	p.add(asm.Mov.Reg(rContext, asm.R1))
	sock := p.event.sock
	if event == eventRetransmitSynAck {
		sock = p.event.request
	}
	p.argument(rSock, sock)
	p.argument(rSkb, p.event.skb)
	return p
}

func (p *program) add(code ...asm.Instruction) {
	for _, ins := range code {
		if p.label != "" {
			ins = ins.WithSymbol(p.label)
			p.label = ""
		}
		p.code = append(p.code, ins)
	}
}

// mark names the next instruction.
func (p *program) mark(label string) {
	if p.label != "" { // an instruction has one name
		p.add(asm.Mov.Reg(rContext, rContext))
	}
	p.label = label
}

// argument loads an argument of the tracepoint, or 0 for one that it lacks.
func (p *program) argument(to asm.Register, i int) {
	if i < 0 {
		p.add(asm.Mov.Imm(to, 0))
		return
	}
	p.add(asm.LoadMem(to, rContext, int16(8*i), asm.DWord))
}

// read reads kernel memory at from + offset into the frame; failing goes to a label.
func (p *program) read(frame, size int, from asm.Register, offset int, failed string) {
	p.add(
		asm.Mov.Reg(asm.R3, from),
		asm.Add.Imm(asm.R3, int32(offset)),
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, int32(frame)),
		asm.Mov.Imm(asm.R2, int32(size)),
		asm.FnProbeReadKernel.Call(),
		asm.JNE.Imm(asm.R0, 0, failed),
	)
}

func (p *program) load(to asm.Register, frame int, size asm.Size) {
	p.add(asm.LoadMem(to, asm.RFP, int16(frame), size))
}

func (p *program) store(frame int, from asm.Register, size asm.Size) {
	p.add(asm.StoreMem(asm.RFP, int16(frame), from, size))
}

// lookup finds the value for the key in the frame; R0 is NULL without.
func (p *program) lookup(name string, key int) {
	p.add(
		asm.LoadMapPtr(asm.R1, 0).WithReference(name),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, int32(key)),
		asm.FnMapLookupElem.Call(),
	)
}

// update stores a value under a key, both in the frame.
func (p *program) update(name string, key, value int, flags int32) {
	p.add(
		asm.LoadMapPtr(asm.R1, 0).WithReference(name),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, int32(key)),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, int32(value)),
		asm.Mov.Imm(asm.R4, flags),
		asm.FnMapUpdateElem.Call(),
	)
}

// clearKey makes a key of nothing but the event.
func (p *program) clearKey(event string) {
	p.add(asm.Mov.Imm(asm.R1, 0))
	for at := 0; at < keySize; at += 8 {
		p.store(frameKey+at, asm.R1, asm.DWord)
	}
	p.add(asm.StoreImm(asm.RFP, frameKey+keyEvent, int64(slices.Index(countedEvents, event)), asm.Byte))
}

// readSock reads the sock_common that rSock points to, which stands in a structure at
// an offset.
func (p *program) readSock(in int) {
	p.read(frameSock, p.k.sock.size, rSock, in+p.k.sock.from, labelLost)
}

// inet goes on only with a socket that speaks IPv4: one of that family, or one of IPv6
// with a mapped address (RFC 4291, section 2.5.5.2), as a listener for both makes.
func (p *program) inet(label string) {
	s := p.k.sock
	p.load(asm.R1, frameSock+s.family, asm.Half)
	p.add(asm.JEq.Imm(asm.R1, unix.AF_INET, label))
	if s.remote6 >= 0 {
		p.load(asm.R1, frameSock+s.remote6, asm.Word)
		p.load(asm.R2, frameSock+s.remote6+4, asm.Word)
		p.add(asm.Or.Reg(asm.R1, asm.R2), asm.JNE.Imm(asm.R1, 0, labelOut))
		p.load(asm.R1, frameSock+s.remote6+8, asm.Word)
		p.add(asm.JEq.Imm32(asm.R1, int32(binary.NativeEndian.Uint32([]byte{0, 0, 0xff, 0xff})), label))
	}
	p.add(asm.Ja.Label(labelOut))
	p.mark(label)
}

// sockHost goes on only if the socket's namespace is a host's, with the host's index
// in R1.
func (p *program) sockHost() {
	p.load(rSaved, frameSock+p.k.sock.net, asm.DWord)
	p.namespaceHost()
}

// namespaceHost does that for the struct net in rSaved.
func (p *program) namespaceHost() {
	p.read(frameScratch, 4, rSaved, p.k.inode, labelOut)
	p.lookup(mapHosts, frameScratch)
	p.add(
		asm.JEq.Imm(asm.R0, 0, labelOut),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
	)
}

// sockKey fills in the key what the socket knows.
func (p *program) sockKey() {
	p.load(asm.R1, frameSock+p.k.sock.local, asm.Word)
	p.store(frameKey+keyLocal, asm.R1, asm.Word)
	p.load(asm.R1, frameSock+p.k.sock.remote, asm.Word)
	p.store(frameKey+keyRemote, asm.R1, asm.Word)
}

func (p *program) sockState() {
	p.load(asm.R1, frameSock+p.k.sock.state, asm.Byte)
	p.store(frameKey+keyState, asm.R1, asm.Byte)
}

// packet reads the packet that rSkb points to and goes on only if it is TCP over
// IPv4, with its addresses in the key: one that has come in by an interface came from
// its remote address.
func (p *program) packet() {
	s := p.k.skb
	p.read(frameSkb, s.size, rSkb, s.from, labelLost)
	p.load(asm.R1, frameSkb+s.protocol, asm.Half)
	p.add(asm.JNE.Imm(asm.R1, int32(binary.NativeEndian.Uint16([]byte{0x08, 0x00})), labelOut)) // ETH_P_IP
	p.load(rSaved, frameSkb+s.head, asm.DWord)
	p.load(asm.R1, frameSkb+s.network, asm.Half)
	p.add(asm.Add.Reg(rSaved, asm.R1))
	p.read(frameIP, 20, rSaved, 0, labelOut)
	p.load(asm.R1, frameIP, asm.Byte)
	p.add(asm.RSh.Imm(asm.R1, 4), asm.JNE.Imm(asm.R1, 4, labelOut))
	p.load(asm.R1, frameIP+9, asm.Byte)
	p.add(asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, labelOut))
	p.load(asm.R1, frameIP+12, asm.Word) // source
	p.load(asm.R2, frameIP+16, asm.Word) // destination
	p.load(asm.R3, frameSkb+s.arrived, asm.Word)
	p.add(asm.JNE.Imm(asm.R3, 0, "arrived"))
	p.store(frameKey+keyLocal, asm.R1, asm.Word)
	p.store(frameKey+keyRemote, asm.R2, asm.Word)
	p.add(asm.Ja.Label("addressed"))
	p.mark("arrived")
	p.store(frameKey+keyLocal, asm.R2, asm.Word)
	p.store(frameKey+keyRemote, asm.R1, asm.Word)
	p.mark("addressed")
}

// packetHost does what sockHost does, by the packet's device. In a packet of a
// socket's queue the device's place holds a pointer to another packet
// (include/linux/skbuff.h, struct sk_buff: rbnode). Whatever that leads to is no
// namespace whose loopback device is in that same namespace.
func (p *program) packetHost() {
	p.read(frameScratch, 8, rSkb, p.k.skb.device, labelOut)
	p.load(rSaved, frameScratch, asm.DWord)
	p.read(frameScratch, 8, rSaved, p.k.device, labelOut)
	p.load(rSaved, frameScratch, asm.DWord)
	p.namespaceHost()
	p.store(frameKey+keyHost, asm.R1, asm.Half)
	p.read(frameScratch, 8, rSaved, p.k.loop, labelOut)
	p.load(asm.R1, frameScratch, asm.DWord)
	p.read(frameScratch, 8, asm.R1, p.k.device, labelOut)
	p.load(asm.R1, frameScratch, asm.DWord)
	p.add(asm.JNE.Reg(asm.R1, rSaved, labelOut))
}

func (p *program) reason() {
	if p.event.reason >= 0 {
		p.argument(asm.R1, p.event.reason)
		p.store(frameKey+keyReason, asm.R1, asm.Word)
	}
}

// stack puts the kernel's stack into the key; without one the key has zeros.
func (p *program) stack() {
	p.add(
		asm.Mov.Reg(asm.R1, rContext),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, frameKey+keyStack),
		asm.Mov.Imm(asm.R3, 8*stackFrames),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnGetStack.Call(),
	)
}

// count counts the event under its key. Another CPU may make the same key at the same
// time.
func (p *program) count() {
	p.lookup(mapCounts, frameKey)
	p.add(asm.JNE.Imm(asm.R0, 0, "found"), asm.Mov.Imm(asm.R1, 1))
	p.store(frameScratch, asm.R1, asm.DWord)
	const noExist = 1 // BPF_NOEXIST
	p.update(mapCounts, frameKey, frameScratch, noExist)
	p.add(asm.JEq.Imm(asm.R0, 0, labelOut))
	p.lookup(mapCounts, frameKey)
	p.add(asm.JEq.Imm(asm.R0, 0, labelLost))
	p.mark("found")
	p.add(asm.Mov.Imm(asm.R1, 1), asm.StoreXAdd(asm.R0, asm.R1, asm.DWord), asm.Ja.Label(labelOut))
}

// finish is the program with its ends.
func (p *program) finish() asm.Instructions {
	p.mark(labelLost)
	p.add(
		asm.LoadMapPtr(asm.R1, 0).WithReference(mapLost),
		asm.StoreImm(asm.RFP, frameScratch, int64(slices.Index(tracedEvents, p.name)), asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, frameScratch),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, labelOut),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
	)
	p.mark(labelOut)
	p.add(asm.Mov.Imm(asm.R0, 0), asm.Return())
	return p.code
}

// socketEvent is for a tracepoint that has a socket, or a request for one, with the
// addresses.
func socketEvent(k *kernelLayout, event string) *program {
	p := newProgram(k, event)
	in := k.inSock
	if event == eventRetransmitSynAck {
		in = k.inReq
	}
	p.readSock(in)
	p.sockHost()
	p.add(asm.Mov.Reg(rSaved, asm.R1))
	p.inet("inet")
	p.clearKey(event)
	p.store(frameKey+keyHost, rSaved, asm.Half)
	p.sockKey()
	p.sockState()
	if event == eventRetransmit && p.event.number >= 0 {
		p.argument(asm.R1, p.event.number)
		p.store(frameKey+keyReason, asm.R1, asm.Word)
	}
	p.count()
	return p
}

// sendReset is for the reset that a packet called for, with or without a socket, and
// for one that a socket sends by itself, which has no packet. The packet's addresses
// are the better ones: a socket that listens has none.
func sendReset(k *kernelLayout) *program {
	p := newProgram(k, eventSendReset)
	p.clearKey(eventSendReset)
	p.add(asm.JEq.Imm(rSock, 0, "closed"))
	p.readSock(k.inSock)
	p.sockHost()
	p.store(frameKey+keyHost, asm.R1, asm.Half)
	p.sockState()
	p.add(asm.JNE.Imm(rSkb, 0, "answer"))
	p.inet("inet")
	p.sockKey()
	p.add(asm.Ja.Label("traced"))
	p.mark("closed")
	p.add(asm.JEq.Imm(rSkb, 0, labelOut))
	p.packetHost()
	p.mark("answer")
	p.packet()
	p.mark("traced")
	p.reason()
	p.stack()
	p.count()
	return p
}

// drop is for a packet that was thrown away, with the socket that it was for where it
// had found one. A packet without either socket or device is one that its socket's queue
// held to the end: a FIN that no program reads, at every connection's end.
func drop(k *kernelLayout) *program {
	p := newProgram(k, eventDrop)
	p.add(asm.JEq.Imm(rSock, 0, "closed"))
	p.readSock(k.inSock)
	p.sockHost()
	p.add(asm.Mov.Reg(rSaved, asm.R1))
	p.clearKey(eventDrop)
	p.store(frameKey+keyHost, rSaved, asm.Half)
	p.sockState()
	p.add(asm.Ja.Label("traced"))
	p.mark("closed")
	p.read(frameScratch, 8, rSkb, k.skb.device, labelOut)
	p.load(asm.R1, frameScratch, asm.DWord)
	p.add(asm.JEq.Imm(asm.R1, 0, labelOut))
	p.clearKey(eventDrop)
	p.packetHost()
	p.mark("traced")
	p.packet()
	p.reason()
	p.stack()
	p.count()
	return p
}
