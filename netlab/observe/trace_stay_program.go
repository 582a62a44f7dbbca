package observe

import (
	"fmt"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// stateChange is for a socket that goes from a state into the next. It keeps since
// when a socket has been in a state of the set, and accounts for the stay as it ends.
//
// This is by far the most frequent event, ten in the life of a connection with both ends,
// and most of them find nothing in the CPU's caches. So those that neither begin nor end a
// stay look at no memory, and of a socket that is known nothing is read again.
func stateChange(k *kernelLayout, stays States) *program {
	const (
		sock  = frameKey // of the frame; this program has no key
		value = frameKey + 8
	)
	p := newProgram(k, eventState)
	p.state(rSaved, p.event.number, stays, asm.R4)
	p.state(rSkb, p.event.number+1, stays, rContext)
	// rSaved, rSkb: the state and the next; R4, rContext: whether they are of the set.
	p.add(
		asm.Mov.Reg(asm.R1, asm.R4),
		asm.Or.Reg(asm.R1, rContext),
		asm.JEq.Imm(asm.R1, 0, labelOut),
	)
	p.store(sock, rSock, asm.DWord)
	p.add(asm.JEq.Imm(asm.R4, 0, "begins"))
	p.lookup(mapSockets, sock)
	p.add(
		asm.JEq.Imm(asm.R0, 0, "begins"), // it stood before the trace began
		asm.LoadMem(asm.R1, asm.R0, socketStateAt, asm.Word),
		asm.JNE.Reg(asm.R1, rSaved, "begins"), // the address is another socket's by now
		asm.Mov.Reg(rSock, asm.R0),
		asm.FnKtimeGetNs.Call(),
		asm.LoadMem(asm.R4, rSock, socketHostAt, asm.Word),
		asm.LoadMem(asm.R5, rSock, socketSinceAt, asm.DWord),
		asm.Mov.Reg(asm.R3, rSaved),
		asm.Mov.Reg(rSaved, asm.R0),
		asm.Sub.Reg(rSaved, asm.R5),
		asm.StoreMem(rSock, socketSinceAt, asm.R0, asm.DWord),
		asm.StoreMem(rSock, socketStateAt, rSkb, asm.Word),
	)
	p.stay()
	p.add(
		asm.JNE.Imm(rContext, 0, labelOut),
		asm.LoadMapPtr(asm.R1, 0).WithReference(mapSockets),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, sock),
		asm.FnMapDeleteElem.Call(),
		asm.Ja.Label(labelOut),
	)

	p.mark("begins")
	p.add(asm.JEq.Imm(rContext, 0, labelOut))
	p.store(value+socketStateAt, rSkb, asm.Word)
	p.readSock(k.inSock)
	p.sockHost()
	p.store(value+socketHostAt, asm.R1, asm.Word)
	p.inet("inet")
	p.read(frameScratch, 2, rSock, k.ipProto, labelLost)
	p.load(asm.R1, frameScratch, asm.Half)
	p.add(
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, labelOut),
		asm.FnKtimeGetNs.Call(),
	)
	p.store(value+socketSinceAt, asm.R0, asm.DWord)
	p.update(mapSockets, sock, value, 0)
	p.add(asm.JEq.Imm(asm.R0, 0, labelOut))
	return p // into lost
}

// state loads an argument that is a state, and whether it is of the set: 0 if not.
func (p *program) state(to asm.Register, argument int, set States, member asm.Register) {
	p.argument(asm.R1, argument)
	p.add(
		asm.LSh.Imm(asm.R1, 32), // an int: the register's other half is not its
		asm.RSh.Imm(asm.R1, 32),
		asm.JGE.Imm(asm.R1, stayStates, labelOut),
		asm.Mov.Imm(asm.R2, int32(set)),
		asm.RSh.Reg(asm.R2, asm.R1),
		asm.And.Imm(asm.R2, 1),
		asm.Mov.Reg(to, asm.R1),
		asm.Mov.Reg(member, asm.R2),
	)
}

// stay accounts for a stay of rSaved nanoseconds on the host in R4, in the state in R3
// before that in rSkb.
func (p *program) stay() {
	// index = (host·stayStates + state)·stayStates + next
	p.add(
		asm.Mul.Imm(asm.R4, stayStates), asm.Add.Reg(asm.R4, asm.R3),
		asm.Mul.Imm(asm.R4, stayStates), asm.Add.Reg(asm.R4, rSkb),
	)
	p.store(frameScratch, asm.R4, asm.Word)
	p.lookup(mapStays, frameScratch)
	p.add(
		asm.JEq.Imm(asm.R0, 0, labelLost),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord), asm.Add.Imm(asm.R1, 1), asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, 8, asm.DWord), asm.Add.Reg(asm.R1, rSaved), asm.StoreMem(asm.R0, 8, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, 16, asm.DWord), asm.JGE.Reg(asm.R1, rSaved, "shorter"), asm.StoreMem(asm.R0, 16, rSaved, asm.DWord),
	)
	// R1 = ⌊log2(rSaved)⌋, by halves.
	p.mark("shorter")
	p.add(asm.Mov.Imm(asm.R1, 0))
	for _, half := range []int32{32, 16, 8, 4, 2, 1} {
		label := fmt.Sprintf("below %d", half)
		p.add(
			asm.Mov.Reg(asm.R2, rSaved),
			asm.RSh.Imm(asm.R2, half),
			asm.JEq.Imm(asm.R2, 0, label),
			asm.Mov.Reg(rSaved, asm.R2),
			asm.Add.Imm(asm.R1, half),
		)
		p.mark(label)
	}
	p.add(
		asm.JLT.Imm(asm.R1, stayBuckets, "bucket"),
		asm.Mov.Imm(asm.R1, stayBuckets-1),
	)
	p.mark("bucket")
	p.add(
		asm.LSh.Imm(asm.R1, 3),
		asm.Add.Reg(asm.R0, asm.R1),
		asm.LoadMem(asm.R1, asm.R0, stayBucketsAt, asm.DWord), asm.Add.Imm(asm.R1, 1), asm.StoreMem(asm.R0, stayBucketsAt, asm.R1, asm.DWord),
	)
}
