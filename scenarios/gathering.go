package scenarios

import (
	"context"
	"sync"
)

// gathering makes arms that are run side by side wait for each other, so that what one prepares
// does not disturb what another measures.
type gathering struct {
	mu      sync.Mutex
	missing int
	all     chan struct{}
}

func newGathering(members int) *gathering {
	g := &gathering{missing: members, all: make(chan struct{})}
	if members == 0 {
		close(g.all)
	}
	return g
}

// member is one arm's part in a gathering. The nil member is alone.
type member struct {
	g    *gathering
	once sync.Once
}

func (g *gathering) member() *member { return &member{g: g} }

// here says that the arm is ready, or will never be. It may be called again.
func (m *member) here() {
	if m == nil {
		return
	}
	m.once.Do(func() {
		m.g.mu.Lock()
		defer m.g.mu.Unlock()
		if m.g.missing--; m.g.missing == 0 {
			close(m.g.all)
		}
	})
}

// await says that the arm is ready and waits for the others. An arm that is tried again
// finds them gone and does not wait.
func (m *member) await(ctx context.Context) error {
	if m == nil {
		return nil
	}
	m.here()
	select {
	case <-m.g.all:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
