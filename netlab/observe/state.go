package observe

import "fmt"

// State is a TCP state with the kernel's number (include/net/tcp_states.h).
type State uint8

// The states of a TCP socket. None is the absence of a socket in a [Joined].
const (
	None State = iota
	Established
	SynSent
	SynRecv
	FinWait1
	FinWait2
	TimeWait
	Close
	CloseWait
	LastAck
	Listen
	Closing
)

var stateNames = [...]string{
	"none", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE",
	"CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING",
}

// String returns the kernel's name without its prefix: "SYN_RECV".
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// States is a set of states: bit s is set for State s, as idiag_states has it.
type States uint32

// AllStates are the states of every socket that sock_diag shows.
const AllStates States = 1<<(Closing+1) - 1<<Established

// SetOf returns the set of the given states.
func SetOf(states ...State) States {
	var set States
	for _, s := range states {
		set |= 1 << s
	}
	return set
}

// CountStates returns how many of the sockets are in each state.
func CountStates(sockets []Socket) map[State]int {
	n := map[State]int{}
	for i := range sockets {
		n[sockets[i].State]++
	}
	return n
}
