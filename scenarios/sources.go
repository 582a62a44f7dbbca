package scenarios

import (
	"golang.org/x/sys/unix"

	"connlab/loadgen"
	"connlab/netlab"
)

// stash makes sockets on a host in advance: going into a namespace takes far
// longer than making a socket, and an arrival must not wait for it.
type stash struct {
	host *netlab.Host
	size int
	fds  []int
}

// stashed is how many sockets all hosts together keep in advance, and stashBatch
// how many one visit to a namespace makes at most.
const (
	stashed    = 2000
	stashBatch = 16
)

func batch(hosts int) int { return max(1, min(stashBatch, stashed/hosts)) }

func (s *stash) socket() (int, error) {
	if len(s.fds) == 0 {
		fds, err := s.host.Sockets(s.size)
		if err != nil {
			return -1, err
		}
		s.fds = fds
	}
	fd := s.fds[len(s.fds)-1]
	s.fds = s.fds[:len(s.fds)-1]
	return fd, nil
}

// sources are the clients' hosts as the load generator sees them. closeUnused
// must be called when the load is over.
func sources(hosts []*netlab.Host) (list []loadgen.Source, closeUnused func(), err error) {
	stashes := make([]*stash, len(hosts))
	closeUnused = func() {
		for _, s := range stashes {
			if s == nil {
				continue
			}
			for _, fd := range s.fds {
				unix.Close(fd)
			}
			s.fds = nil
		}
	}
	for i, h := range hosts {
		stashes[i] = &stash{host: h, size: batch(len(hosts))}
		if stashes[i].fds, err = h.Sockets(stashes[i].size); err != nil {
			closeUnused()
			return nil, nil, err
		}
		list = append(list, loadgen.Source{Name: h.Name(), Socket: stashes[i].socket})
	}
	return list, closeUnused, nil
}
