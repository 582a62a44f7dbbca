package loadgen

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPlayCallsEachOperationWhenItIsDue(t *testing.T) {
	s := Merge(Constant(1000, 100*time.Millisecond), Burst(5, 50*time.Millisecond))
	var got []time.Duration
	start := time.Now()
	require.NoError(t, s.Play(t.Context(), start, func(index int, due time.Duration) {
		assert.Equal(t, len(got), index)
		assert.GreaterOrEqual(t, time.Since(start), due, "called before it was due")
		got = append(got, due)
	}))
	var want []time.Duration
	for due := range s {
		want = append(want, due)
	}
	assert.Equal(t, want, got)
}

func TestPlayIsNotSlowedDownByOperationsThatAreOverdue(t *testing.T) {
	calls := 0
	start := time.Now().Add(-time.Hour) // all are overdue
	require.NoError(t, Constant(1, time.Hour).Play(t.Context(), start, func(int, time.Duration) { calls++ }))
	assert.Equal(t, 3600, calls)
	assert.Less(t, time.Since(start)-time.Hour, 10*time.Second)
}

func TestPlayEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	calls := 0
	err := Merge(Burst(3, 0), Burst(1, time.Hour)).Play(ctx, time.Now(), func(int, time.Duration) {
		if calls++; calls == 3 {
			cancel(reason)
		}
	})
	require.ErrorIs(t, err, reason)
	assert.Equal(t, 3, calls)
}
