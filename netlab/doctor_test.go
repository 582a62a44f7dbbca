package netlab

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestDoctor(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	findings := map[Need]Finding{}
	for _, f := range Doctor() {
		t.Logf("%v %s: %s", f.OK, f.Need, f.Detail)
		assert.NotContains(t, findings, f.Need, "each need once")
		findings[f.Need] = f
		assert.NotEmpty(t, f.Detail, f.Need)
		assert.NotEmpty(t, f.Cost, f.Need)
		assert.NotContains(t, f.Detail, "\n", f.Need)
		if f.OK {
			assert.NotContains(t, f.Detail, "not probed", f.Need)
		}
	}
	for _, n := range []Need{
		NeedPrivilege, NeedNamespace, NeedVeth, NeedBridge, NeedTUN, NeedNetem, NeedNftables, NeedBTF, NeedTracepoints,
		NeedFiles, NeedUntracked, NeedPlainTCP, NeedSYNTimers, NeedRedis, NeedHAProxy, NeedNginx, NeedRestyRedis, NeedTshark,
		NeedPrometheus, NeedNodeExporter,
	} {
		assert.Contains(t, findings, n)
	}
	assert.Equal(t, CheckPrivilege() == nil, findings[NeedPrivilege].OK)
	if !findings[NeedPrivilege].OK {
		for _, n := range []Need{NeedNamespace, NeedVeth, NeedBridge, NeedTUN, NeedNetem, NeedNftables, NeedUntracked, NeedPlainTCP, NeedSYNTimers} {
			assert.False(t, findings[n].OK, n)
			assert.True(t, strings.HasPrefix(findings[n].Detail, "not probed: needs CAP_NET_ADMIN"), findings[n].Detail)
		}
		return
	}
	// What the probe says is what a lab meets.
	assert.Equal(t, netemAvailable(), findings[NeedNetem].OK)
	lab, err := Up(t.Context(), star(1))
	if err == nil {
		require.NoError(t, lab.Down())
	}
	able := findings[NeedNamespace].OK && findings[NeedVeth].OK && findings[NeedBridge].OK
	assert.Equal(t, able, err == nil, "Up: %v", err)
	fresh := openScratch()
	defer fresh.close()
	_, untracked, err := probeConntrack(fresh)
	require.NoError(t, err)
	assert.Equal(t, untracked, findings[NeedUntracked].OK, "the nat chain of another probe is not found as tracking")
	// go.mod says godebug multipathtcp=0; without it this fails on every current kernel.
	assert.True(t, findings[NeedPlainTCP].OK, findings[NeedPlainTCP].Detail)
	for need, program := range map[Need]string{NeedRedis: "redis-server", NeedHAProxy: "haproxy", NeedTshark: "tshark", NeedPrometheus: "prometheus", NeedNodeExporter: "prometheus-node-exporter"} {
		path, err := LookProgram(program)
		assert.Equal(t, err == nil, findings[need].OK, program)
		if err == nil {
			assert.Regexp(t, "^"+regexp.QuoteMeta(path)+` \d+\.\d+`, findings[need].Detail)
		}
	}
	nginx, err := LookNginx()
	assert.Equal(t, err == nil, findings[NeedNginx].OK, "nginx: %v", err)
	if err == nil {
		assert.Equal(t, nginx.Path+" "+nginx.Version+" with "+nginx.Modules[1], findings[NeedNginx].Detail)
	}
	file, _, err := LookRestyRedis()
	assert.Equal(t, err == nil, findings[NeedRestyRedis].OK, "lua-resty-redis: %v", err)
	if err == nil {
		assert.Contains(t, findings[NeedRestyRedis].Detail, file)
	}
}

func TestDoctorLeavesNothing(t *testing.T) {
	Doctor()
	before := holding(t)
	const labs = 20
	for range labs {
		Doctor()
	}
	requireNothingMore(t, before, labs)
}

func TestFindingOfAProbe(t *testing.T) {
	for _, row := range []struct {
		reason string
		detail string
		ok     bool
		err    error
		want   Finding
	}{
		{"met", "seen", true, nil, Finding{OK: true, Detail: "seen"}},
		{"seen and not enough", "seen", false, nil, Finding{Detail: "seen"}},
		{"inconclusive", "made", true, unix.EMFILE, Finding{Detail: "not probed: too many open files"}},
		{"the kernel lacks it", "made", true, fmt.Errorf("%w: %w", ErrUnsupported, unix.ENOSYS), Finding{Detail: "this kernel does not have it: function not implemented"}},
		{"this need is not met", "made", true, &NeedError{Need: NeedVeth, Err: unix.EOPNOTSUPP}, Finding{Detail: "operation not supported"}},
		{"another need is not met, so nothing is known of this one", "made", true, &NeedError{Need: NeedPrivilege, Err: unix.EPERM}, Finding{Detail: "not probed: needs CAP_NET_ADMIN + CAP_SYS_ADMIN: operation not permitted"}},
		{"two lines become one", "", false, errors.Join(unix.EIO, unix.EPERM), Finding{Detail: "not probed: input/output error; operation not permitted"}},
	} {
		p := probe{need: NeedVeth, cost: "cost", try: func(*scratch) (string, bool, error) { return row.detail, row.ok, row.err }}
		row.want.Need, row.want.Cost = NeedVeth, "cost"
		assert.Equal(t, row.want, p.run(nil), row.reason)
	}
}

func TestNftError(t *testing.T) {
	for _, row := range []struct {
		reason string
		err    error
		lacks  bool
	}{
		{"no nfnetlink", unix.EPROTONOSUPPORT, true},
		{"no nf_tables: one answer, then silence", errors.Join(unix.EOPNOTSUPP, os.ErrDeadlineExceeded), true},
		{"no nat chains", unix.ENOENT, true},
		{"no such subsystem", unix.EINVAL, true},
		{"silence alone tells nothing", os.ErrDeadlineExceeded, false},
		{"not allowed tells nothing", unix.EPERM, false},
	} {
		need, is := errors.AsType[*NeedError](nftError("nat chain", row.err))
		assert.Equal(t, row.lacks, is, row.reason)
		if is {
			assert.Equal(t, NeedNftables, need.Need, row.reason)
			assert.ErrorIs(t, need, ErrUnsupported, row.reason)
		}
	}
}

func TestDescribeFiles(t *testing.T) {
	assert.Equal(t, "soft limit 20000, hard limit 20000: one process holds 19900 connections, 150000 take 8 processes on each side", describeFiles(20000, 20000))
	assert.Equal(t, "soft limit 1024, hard limit 1048576: one process holds 150000 connections, 150000 take 1 processes on each side", describeFiles(1024, 1<<20))
	assert.Equal(t, "soft limit 64, hard limit 64", describeFiles(64, 64))
}

func TestNeedErrorText(t *testing.T) {
	err := needOr(NeedVeth, fmt.Errorf("veth pair: %w", unix.EOPNOTSUPP))
	require.EqualError(t, err, "needs veth: this kernel does not have it: veth pair: operation not supported")
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorIs(t, err, unix.EOPNOTSUPP)
	assert.Equal(t, unix.EPERM, needOr(NeedVeth, unix.EPERM), "not a statement about the kernel")
	assert.NoError(t, needOr(NeedVeth, nil))
}

// A signal makes the kernel's verifier give up with EAGAIN, and Go's runtime sends
// its threads signals: the probe must not take that for a lack.
func TestProbeSurvivesSignals(t *testing.T) {
	requireLab(t, CheckPrivilege())
	stop, done := make(chan struct{}), make(chan struct{})
	tid := make(chan int)
	go func() {
		defer close(done)
		victim := <-tid
		for {
			select {
			case <-stop:
				return
			default:
				// SIGURG is what the runtime itself uses, and ignores when it is not its own.
				assert.NoError(t, unix.Tgkill(unix.Getpid(), victim, unix.SIGURG))
			}
		}
	}()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid <- unix.Gettid()
	for range 300 {
		fd, err := loadEmptyProgram()
		if !assert.NoError(t, err) {
			break
		}
		unix.Close(fd)
	}
	close(stop)
	<-done
}
