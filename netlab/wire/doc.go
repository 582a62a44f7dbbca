// Package wire is the packet path of a lab in user space: Ethernet frames come
// from one TAP descriptor, pass stages that see each of them, and leave by another.
//
// A [Stage] forwards a packet, drops it, holds it or rewrites it. A [Wire] has
// stages for both ways through one link ([Wire.Pump], a [netlab.Pump]) or for the
// one way through a device on a switch ([Wire.Attach], a [netlab.Attach]). What a
// link itself does, Loss and Delay, are stages at the end of its list; [Pump] is
// a link with no others whose counters nobody reads. Every frame that is read
// ends in exactly one column of [Counts] or is still on its way.
//
// A [Segment] is how a stage reads and rewrites TCP over IPv4. Lengths and
// checksums are right after each change if they were right before: checksums
// change by difference (RFC 1624 equation 3), so that the receiver of a segment
// that came in corrupt still finds it so.
//
// What it rests on:
//
//   - A TAP descriptor gives one frame a read and takes one a write
//     (drivers/net/tun.c, tun_do_read and tun_get_user). Without IFF_VNET_HDR and
//     TUNSETOFFLOAD the kernel has completed checksums and cut segments to the MTU
//     before the frame is read; it checks both checksums of what is written.
//   - ppoll(2) wakes with nanosecond resolution on a thread whose timer slack is
//     one nanosecond (PR_SET_TIMERSLACK).
//   - Packets leave by due time, and at one due time in the order in which they
//     came: equal holds keep the order, different ones change it.
//
// What it refuses to do: deliver a frame early, hold more than [MaxInFlight] of
// them, let one grow beyond the MTU, put fragments together, look through a VLAN
// tag or at IPv6, make frames of its own (no ARP, no ICMP), or keep connections:
// that is for stages.
//
// # Speed
//
// A frame costs one thread some 3 to 4.5 microseconds of processor time, nine tenths of
// it inside the two system calls; rewriting the addresses and adding an option
// to a SYN cost less than a tenth of a microsecond (BenchmarkDevice,
// BenchmarkAddOption). Up to 64 frames are read for one wake-up, and the busier
// the wire, the more there are. Not polling while there may be more to read, raw system
// calls past the Go scheduler, and writing without the queue what is not held
// were each tried beside this and made no difference that could be measured.
//
// # Alternatives considered
//
// A goroutine and a timer per frame: the runtime's timers wake up to a
// millisecond late, and order is lost. epoll: no gain over poll for three
// descriptors. A busy loop: exact to a microsecond, at the price of one of two cores.
// IFF_NAPI or offloads on the TAP devices: several segments become one (GRO), and
// a capture behind the wire no longer shows what was sent. One heap for all packets:
// less code, and several times as slow a queue for a link with one delay, which is
// the common one. Checksums from scratch: simpler, but a stage would then repair
// what was broken on the way.
package wire
