// Package netlab stands up a network of Linux network namespaces from a value
// and takes it down again.
//
// A [Topology] says which hosts there are, which switches join them, and which
// sysctls each host has. [Up] checks it, builds it and returns a [Lab] whose
// links are operational; [Lab.Down] removes it. In between, programs run on
// hosts ([Host.Start]), sockets are made on hosts ([Host.Socket],
// [Host.DialContext]) and measurements open their files there ([Host.Do]). What
// is no kernel, such as a balancer in user space, is a device on a switch
// ([DeviceSpec]).
//
// What it rests on:
//
//   - Namespaces are anonymous: made by unshare(CLONE_NEWNET) and held by a
//     descriptor of this process only. Nothing is mounted under /run/netns, so
//     the kernel removes all of it when the process ends, by kill -9 too.
//   - A switch is a bridge in a namespace of its own; a link is a veth pair, or
//     a pair of TAP devices with a pump in user space between them where the
//     link has latency or loss and the kernel has no netem (net/sched/sch_netem.c).
//     A device is one TAP device, a port of the bridge.
//   - The namespace of a thread decides where a socket is born; the socket
//     stays there. One locked OS thread a Lab enters namespaces (setns); no
//     other code of connlab does. See the README of containernetworking/plugins
//     pkg/ns for why goroutines and namespaces do not mix.
//   - Children get a parent-death signal (prctl PR_SET_PDEATHSIG), which
//     follows the thread that started them: that same locked thread. Programs
//     that fork are contained in a process-id namespace instead, and those that
//     must write files can have mounts of their own ([Program]).
//
// What it refuses to do: write a sysctl outside its own namespaces, touch an
// interface, route or firewall rule of the host, or leave a name behind.
//
// # Alternatives considered
//
// Named namespaces under /run/netns: convenient for `ip netns exec`, but a
// killed run leaves them behind; `nsenter --net --target PID` enters the
// namespace of a running server without a name. Containers: images and a
// daemon, and nothing gained over a namespace. One thread per host: 121 threads
// to save a setns of about a microsecond. Every program in a process-id
// namespace: one more process each, and a program that looks itself up in /proc
// by its pid, as redis-server 7.0 does for its memory, finds another. Learning
// switch and ARP as they come: the first packet of each pair then waits in ARP's
// short queue, which shows up as a loss that the experiment did not ask for.
package netlab
