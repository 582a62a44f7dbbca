package scenarios

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"connlab/loadgen"
	"connlab/netlab"
	"connlab/results"
)

// fillProbes is how many connect(2) calls are timed at each part of the ports.
const fillProbes = 200

// fillRate is how many connections a second put ports into TIME_WAIT.
const fillRate = 6000

func fillLabel(x float64) string { return "taken=" + strconv.FormatFloat(x, 'g', -1, 64) }

// measureConnects fills the local ports with TIME_WAITs step by step, and times
// connect(2) at each. The probes are closed by RST, so that they leave their ports free.
func (r *undersizedRun) measureConnects(ctx context.Context, host *netlab.Host) error {
	taken := 0
	var first time.Duration
	for i, x := range r.u.Fill {
		if err := r.take(ctx, host, int(x*float64(r.u.Ports))-taken); err != nil {
			return err
		}
		taken = int(x * float64(r.u.Ports))
		r.opt.progress("%d of %d ports in TIME_WAIT: timing connect(2)", taken, r.u.Ports)
		cpu, refused, err := timeConnects(host)
		if err != nil {
			return err
		}
		if i == 0 {
			first = cpu
		}
		metric := func(name string, value float64, unit string) {
			r.v.Metrics[fillLabel(x)+"/"+name] = results.Metric{Value: value, Unit: unit}
		}
		metric(metricConnectCPU, cpu.Seconds(), "s")
		metric(metricConnectCPU+".Ratio", float64(cpu)/float64(first), "")
		metric("Connect.NoLocalPort", float64(refused), "connects")
	}
	return nil
}

// take puts n more ports into TIME_WAIT.
func (r *undersizedRun) take(ctx context.Context, host *netlab.Host, n int) error {
	if n <= 0 {
		return nil
	}
	from, closeUnused, err := sources([]*netlab.Host{host})
	if err != nil {
		return err
	}
	defer closeUnused()
	cfg := loadgen.Config{Targets: instances(1), Sources: from, Schedule: loadgen.Constant(fillRate, time.Hour).First(n), Progress: &loadgen.Progress{}}
	stop := every(time.Second, func() {
		r.opt.progress("taking ports: %d of %d", cfg.Progress.Snapshot().OK, n)
	})
	defer stop()
	report, err := loadgen.Run(ctx, cfg)
	if err != nil {
		return err
	}
	if report.OK != int64(n) {
		return fmt.Errorf("only %d of %d ports could be put into TIME_WAIT: %v", report.OK, n, report.Failed)
	}
	return noneClosing(ctx, host)
}

// timeConnects is the median CPU time of a connect(2), and how many found no local
// port. The time is the thread's, which on a link inside one machine includes the
// way of the SYN to the other end and back.
func timeConnects(host *netlab.Host) (cpu time.Duration, refused int, err error) {
	to := instances(1)[0]
	peer := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	var times []time.Duration
	err = host.Do(func() error {
		for range fillProbes {
			took, err := timeConnect(peer)
			switch {
			case errors.Is(err, unix.EADDRNOTAVAIL):
				refused++
			case err != nil && !errors.Is(err, unix.EINPROGRESS):
				return os.NewSyscallError("connect", err)
			}
			times = append(times, took)
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	slices.Sort(times)
	return times[len(times)/2], refused, nil
}

func timeConnect(peer unix.Sockaddr) (took time.Duration, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	before, after := unix.Timespec{}, unix.Timespec{}
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before) // there is such a clock
	err = unix.Connect(fd, peer)
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after)
	return time.Duration(after.Nano() - before.Nano()), err
}
