package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"

	"connlab/scenarios/diagnose"
)

func newDiagnose() *cobra.Command {
	var before string
	var pid int
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "diagnose [FILE...]",
		Short: "Which connection incident do the counters of a server fit?",
		Long: `Diagnose reads the kernel's counters of one host, as you saved them there, and says
for each incident what speaks for it and what against it, which one fits, or which one
observation would decide. It needs no root and changes nothing.

A FILE may hold any of these, one after the other, and several files are read as one
(- is standard input); the more of them, the more can be told:

  cat /proc/net/netstat /proc/net/snmp      all counters; or netstat -s in English, or nstat -az,
                                            which leaves out how many connections are established
  cat /proc/net/sockstat                    TIME_WAITs and sockets in use
  sysctl net.ipv4.ip_local_port_range net.ipv4.tcp_max_tw_buckets net.ipv4.tcp_tw_reuse
  ss -lnt                                   the accept queues

Without a FILE it reads this machine's own counters, those of the network namespace
that it runs in; with --pid those of another process's namespace. Sysctls of another
namespace cannot be read from outside (/proc/sys/net shows those of who reads), so
with --pid they are left out unless that process shares our namespace.

What the counters are worth:
  They count since boot, so they say that something happened, not when. Save them
  twice while it happens and give the first with --before.
  They count attempts, not clients: a SYN that is sent again is dropped again.
  They are one host's. The server's counters show a full queue; the client's show
  nothing but SYNs sent again. Local ports that run out are counted nowhere at all.
  What is not in the input counts as unknown, not as zero.

Incidents: backlog, accept-queue, tuple-collision, mixed-pool, undersized-pool (see
connlab list), syn-flood, tw_recycle, and healthy.

Exit codes: 0 one incident fits, or healthy; 3 not enough evidence; 2 a file cannot be
read, or holds nothing that is known.`,
		Example: `  nstat -az | connlab diagnose -
  (cat /proc/net/netstat /proc/net/snmp /proc/net/sockstat; sysctl net.ipv4.ip_local_port_range; ss -lnt) > now.txt
  connlab diagnose now.txt
  connlab diagnose --before then.txt now.txt
  sudo connlab diagnose --pid $(pidof redis-server) --json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("pid") && len(args) > 0 {
				return usageErrorf("connlab diagnose reads files or, with --pid, a process's namespace; got both")
			}
			var now diagnose.Snapshot
			var err error
			if len(args) > 0 {
				now, err = savedSnapshot(cmd.InOrStdin(), args...)
			} else {
				now, err = liveSnapshot("/proc", cmd.ErrOrStderr(), pid)
			}
			if err != nil {
				return exitError{exitUsage, err}
			}
			var then *diagnose.Snapshot
			if before != "" {
				s, err := savedSnapshot(cmd.InOrStdin(), before)
				if err != nil {
					return exitError{exitUsage, err}
				}
				then = &s
			}
			d, err := diagnose.Diagnose(now, then)
			if err != nil {
				return exitError{exitUsage, err}
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				enc.SetEscapeHTML(false)
				err = enc.Encode(d)
			} else {
				err = d.Write(cmd.OutOrStdout())
			}
			if err == nil && d.Verdict == diagnose.NotEnough {
				return exitError{code: exitVoid}
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&before, "before", "", "a `file` that was saved earlier on the same host: compare by what grew since")
	f.IntVar(&pid, "pid", 0, "read the network namespace of this `process`")
	f.BoolVar(&asJSON, "json", false, "write the diagnosis as one JSON document")
	return cmd
}

// savedSnapshot reads files of one host; "-" is standard input.
func savedSnapshot(stdin io.Reader, paths ...string) (diagnose.Snapshot, error) {
	files := make([]diagnose.File, len(paths))
	for i, path := range paths {
		var err error
		files[i].Name = path
		if path == "-" {
			files[i].Name = "standard input"
			files[i].Text, err = io.ReadAll(stdin)
		} else {
			files[i].Text, err = os.ReadFile(path)
		}
		if err != nil {
			return diagnose.Snapshot{}, err
		}
	}
	return diagnose.Parse(files...)
}

// liveSnapshot reads the counters of a process's network namespace below proc, our
// own if pid is 0. The files of /proc/PID/net are those of that process's
// namespace (fs/proc/proc_net.c, get_proc_task_net), while /proc/sys/net is that
// of the thread that reads (net/sysctl_net.c, net_ctl_header_lookup): sysctls are
// read only if both are the same.
func liveSnapshot(proc string, notes io.Writer, pid int) (diagnose.Snapshot, error) {
	const own = "thread-self"
	process := own
	if pid != 0 {
		process = strconv.Itoa(pid)
	}
	var files []diagnose.File
	for _, name := range []string{"netstat", "snmp", "sockstat"} {
		text, err := os.ReadFile(filepath.Join(proc, process, "net", name))
		if err != nil {
			return diagnose.Snapshot{}, fmt.Errorf("reading the counters of a namespace: %w", err)
		}
		files = append(files, diagnose.File{Name: name, Text: text})
	}
	same := process == own
	if !same {
		mine, err1 := os.Readlink(filepath.Join(proc, own, "ns", "net"))
		its, err2 := os.Readlink(filepath.Join(proc, process, "ns", "net"))
		same = err1 == nil && err2 == nil && mine == its
	}
	if !same {
		fmt.Fprintf(notes, "note: process %d is in another network namespace, or may not be asked: without its sysctls\n", pid)
		return diagnose.Parse(files...)
	}
	var sysctls bytes.Buffer
	if err := diagnose.WriteSysctls(&sysctls, proc); err != nil {
		return diagnose.Snapshot{}, err
	}
	return diagnose.Parse(append(files, diagnose.File{Name: "sysctls", Text: sysctls.Bytes()})...)
}
