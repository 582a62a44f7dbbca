package loadgen_test

import (
	"fmt"
	"time"

	"connlab/loadgen"
)

func ExampleMerge() {
	stages := loadgen.Merge(
		loadgen.Constant(2, time.Second),                    // two a second,
		loadgen.Ramp(0, 6, time.Second).After(time.Second),  // then rising to six,
		loadgen.Burst(2, 1500*time.Millisecond),             // and two at once on top
		loadgen.Constant(1, time.Hour).After(time.Second*3), // then one a second
	)
	for due := range stages.First(8) {
		fmt.Println(due.Round(time.Millisecond))
	}
	// Output:
	// 0s
	// 500ms
	// 1s
	// 1.5s
	// 1.5s
	// 1.577s
	// 1.816s
	// 3s
}
