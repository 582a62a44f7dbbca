package loadgen

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
)

// TestClassesOfErrorsOfPackageNet gives errors as net.Dialer and net.Conn make
// them.
func TestClassesOfErrorsOfPackageNet(t *testing.T) {
	dial := func(call string, errno syscall.Errno) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError(call, errno)}
	}
	use := func(op string, err error) error {
		return fmt.Errorf("ping: %w", &net.OpError{Op: op, Net: "tcp", Err: err})
	}
	for _, c := range []struct {
		of   func(error) Class
		err  error
		want Class
	}{
		{ConnectClass, dial("connect", syscall.ECONNREFUSED), ConnectRefused},
		{ConnectClass, dial("connect", syscall.ECONNRESET), ConnectReset},
		{ConnectClass, dial("connect", syscall.EADDRNOTAVAIL), NoLocalPort},
		{ConnectClass, dial("bind", syscall.EADDRINUSE), NoLocalPort}, // a dialer that binds first
		{ConnectClass, dial("connect", syscall.ETIMEDOUT), ConnectTimeout},
		{ConnectClass, &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, ConnectTimeout},
		{ConnectClass, context.DeadlineExceeded, ConnectTimeout},
		{ConnectClass, context.Canceled, Canceled},
		{ConnectClass, dial("socket", syscall.EMFILE), TooManyFiles},
		{ReplyClass, use("write", os.NewSyscallError("write", syscall.ECONNRESET)), WriteReset},
		{ReplyClass, use("write", os.NewSyscallError("write", syscall.EPIPE)), WriteBrokenPipe},
		{ReplyClass, use("read", os.NewSyscallError("read", syscall.ECONNRESET)), ReadReset},
		{ReplyClass, use("read", os.ErrDeadlineExceeded), ReadTimeout},
		{ReplyClass, io.EOF, EOF}, // net.Conn does not wrap it
		{ReplyClass, fmt.Errorf("%w: LOADING", ErrServer), ServerError},
		{ReplyClass, net.ErrClosed, Other},
	} {
		assert.Equal(t, c.want, c.of(c.err), "%v", c.err)
	}
}
