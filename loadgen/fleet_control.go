package loadgen

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// fleetAnswer is one line of the answers of a fleet under control.
type fleetAnswer struct {
	Command string       `json:"command"`
	Error   string       `json:"error,omitempty"`
	Report  *FleetReport `json:"report,omitempty"`
}

const fleetCommands = `fill, arm, storm <unix µs> <settle ms>, ping <timeout ms>, report, quit`

var errQuit = errors.New("quit")

// controlFleet does what the lines of in say until they end, or one says quit.
// Each is answered with one line of JSON. In between it watches the connections.
func controlFleet(ctx context.Context, f *Fleet, in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	for {
		line, ok, err := nextLine(ctx, f, lines)
		if err != nil || !ok {
			return err
		}
		report, err := f.do(ctx, line)
		quit := errors.Is(err, errQuit)
		answer := fleetAnswer{Command: line, Report: report}
		if err != nil && !quit {
			answer.Error = err.Error()
		}
		text, err := json.Marshal(answer)
		if err != nil {
			return fmt.Errorf("answering %q: %w", line, err)
		}
		debug.FreeOSMemory() // to encode it took some megabytes, which is more than the clients have
		if _, err := out.Write(append(text, '\n')); err != nil {
			return fmt.Errorf("answering %q: %w", line, err)
		}
		if quit {
			return nil
		}
	}
}

// nextLine watches the connections until a line has come. It is not ok where there
// are no more, or ctx is done: a read that still waits for one then is left to the
// end of the program.
func nextLine(ctx context.Context, f *Fleet, lines *bufio.Scanner) (line string, ok bool, err error) {
	idle, stop := context.WithCancel(ctx)
	defer stop()
	read := make(chan string, 1)
	failed := make(chan error, 1)
	go func() {
		defer stop()
		if lines.Scan() {
			read <- lines.Text()
			return
		}
		failed <- lines.Err()
	}()
	if err := f.Watch(idle); err != nil {
		return "", false, err
	}
	select {
	case line := <-read:
		return line, true, nil
	case err := <-failed:
		if err != nil {
			return "", false, fmt.Errorf("reading commands: %w", err)
		}
	default:
	}
	return "", false, nil
}

// do executes one command.
func (f *Fleet) do(ctx context.Context, line string) (*FleetReport, error) {
	verb, args := "", strings.Fields(line)
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	numbers := make([]int64, len(args))
	for i, arg := range args {
		var err error
		if numbers[i], err = strconv.ParseInt(arg, 10, 64); err != nil {
			return nil, fmt.Errorf("%s: %q is no whole number", verb, arg)
		}
	}
	form := fmt.Sprintf("%s %d", verb, len(args))
	switch form {
	case "fill 0":
		return f.Fill(ctx)
	case "arm 0":
		f.Arm()
		return f.Report(), nil
	case "storm 2":
		at, settle := time.UnixMicro(numbers[0]), numbers[1]
		if wait := time.Until(at); wait > maxFleetWait || wait < -maxFleetWait {
			return nil, fmt.Errorf("storm: %s is %v from now, more than %v", args[0], wait.Round(time.Second), maxFleetWait)
		}
		if settle < 1 || settle > maxFleetWait.Milliseconds() {
			return nil, fmt.Errorf("storm: %d ms to settle are out of range: 1 to %d", settle, maxFleetWait.Milliseconds())
		}
		return f.Storm(ctx, at, time.Duration(settle)*time.Millisecond)
	case "ping 1":
		timeout := numbers[0]
		if timeout < 1 || timeout > maxFleetWait.Milliseconds() {
			return nil, fmt.Errorf("ping: a timeout of %d ms is out of range: 1 to %d", timeout, maxFleetWait.Milliseconds())
		}
		return f.Ping(ctx, time.Duration(timeout)*time.Millisecond)
	case "report 0":
		return f.Report(), nil
	case "quit 0":
		return f.Report(), errQuit
	}
	return nil, fmt.Errorf("unknown command %q; there is: %s", line, fleetCommands)
}

// FleetClient is the other end of `connlab fleet --control`: it tells a fleet in
// another process what to do. It is for one goroutine at a time.
type FleetClient struct {
	in     io.WriteCloser
	out    *bufio.Reader
	broken error // what made the two lose step
}

// NewFleetClient takes the standard input and output of the process.
func NewFleetClient(stdin io.WriteCloser, stdout io.Reader) *FleetClient {
	return &FleetClient{in: stdin, out: bufio.NewReader(stdout)}
}

// Do sends one command and waits for its answer: "fill", "arm", "storm <unix µs>
// <settle ms>", "ping <timeout ms>", "report" or "quit". An error that the fleet
// reports may come with an account. If ctx is done first the fleet is told to end,
// and nothing more can be asked of it.
func (c *FleetClient) Do(ctx context.Context, command string) (*FleetReport, error) {
	if c.broken != nil {
		return nil, fmt.Errorf("fleet: %s: after %w", command, c.broken)
	}
	type result struct {
		answer fleetAnswer
		err    error
	}
	done := make(chan result, 1)
	go func() {
		answer, err := c.ask(command)
		done <- result{answer, err}
	}()
	var r result
	select {
	case r = <-done:
	case <-ctx.Done():
		_ = c.in.Close()
		r.err = context.Cause(ctx)
	}
	if r.err != nil {
		c.broken = r.err
		return nil, fmt.Errorf("fleet: %s: %w", command, r.err)
	}
	if r.answer.Error != "" {
		return r.answer.Report, fmt.Errorf("%s: %s", command, r.answer.Error)
	}
	return r.answer.Report, nil
}

func (c *FleetClient) ask(command string) (answer fleetAnswer, err error) {
	if strings.Contains(command, "\n") {
		return answer, errors.New("a command is one line")
	}
	if _, err := io.WriteString(c.in, command+"\n"); err != nil {
		return answer, fmt.Errorf("sending it: %w", err)
	}
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		return answer, fmt.Errorf("waiting for the answer: %w", err)
	}
	if err := json.Unmarshal(line, &answer); err != nil {
		return answer, fmt.Errorf("the answer: %w", err)
	}
	if answer.Command != command {
		return answer, fmt.Errorf("the answer is to %q", answer.Command)
	}
	return answer, nil
}

// Close ends the fleet: it closes the input, and the program ends with it.
func (c *FleetClient) Close() error { return c.in.Close() }
