package scenarios

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestGathering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(3)
		began := time.Now()
		waited := make(chan time.Duration, 2)
		for _, after := range []time.Duration{time.Second, 2 * time.Second} {
			m := g.member()
			go func() {
				time.Sleep(after)
				assert.NoError(t, m.await(t.Context()))
				assert.NoError(t, m.await(t.Context()), "a second try does not wait")
				waited <- time.Since(began)
			}()
		}
		broken := g.member()
		time.Sleep(3 * time.Second)
		broken.here() // ends before it was ready
		broken.here()
		assert.Equal(t, 3*time.Second, <-waited)
		assert.Equal(t, 3*time.Second, <-waited)

		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		assert.ErrorIs(t, newGathering(2).member().await(canceled), context.Canceled)
		assert.NoError(t, (*member)(nil).await(t.Context()), "alone")
	})
}
