package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/remuda-dev/remuda/client"
)

// A command may take as long as its apps take to start or stop. A daemon that
// is there and does not even say so much as its name for this long is stuck.
const (
	pulseEvery = 5 * time.Second
	pulseLimit = 10 * time.Second
)

// silentError is a daemon that takes calls and does not answer them.
type silentError struct {
	home    string
	limit   time.Duration
	pid     int  // of its controller, 0 where it cannot be told
	stopped bool // by SIGSTOP or a debugger
}

func (e *silentError) Error() string {
	text := fmt.Sprintf("the daemon in %s has not answered for %s", e.home, e.limit)
	if e.stopped {
		return fmt.Sprintf("%s: its controller (pid %d) is stopped by a signal; `kill -CONT %d` lets it go on", text, e.pid, e.pid)
	}
	if e.pid != 0 {
		return fmt.Sprintf("%s; see %s, or end its controller by `kill -9 %d`: another takes its place and no app is stopped", text, filepath.Join(e.home, "logs", "daemon.log"), e.pid)
	}
	return fmt.Sprintf("%s; see %s", text, filepath.Join(e.home, "logs", "daemon.log"))
}

// guarded carries out f and gives up where the daemon falls silent meanwhile:
// every so often it is asked who it is, and has until limit to tell. Where f
// follows a stream, the silence is told and f goes on.
func (c *cli) guarded(ctx context.Context, every, limit time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.listen(ctx, every, limit); err != nil {
			cancel(err)
		}
	}()
	err := f(ctx)
	cancel(nil)
	<-done
	var silent *silentError
	if err != nil && errors.As(context.Cause(ctx), &silent) {
		return &ExitError{Code: ExitUnreachable, Err: silent}
	}
	return err
}

// listen returns when ctx ends, or with a [silentError].
func (c *cli) listen(ctx context.Context, every, limit time.Duration) error {
	next := time.NewTimer(every)
	defer next.Stop()
	told := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-next.C:
		}
		short, cancel := context.WithTimeout(ctx, limit)
		_, err := c.client.Info(short)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case !errors.Is(err, context.DeadlineExceeded):
			told = false // an answer, or a daemon that is gone, which f sees itself
		case !c.following.Load():
			return c.silence(limit)
		case !told:
			c.say("%s", c.silence(limit))
			told = true
		}
		next.Reset(every)
	}
}

// silence finds out who does not answer: the process that listens on the
// daemon's socket.
func (c *cli) silence(limit time.Duration) *silentError {
	e := &silentError{home: c.client.Home(), limit: limit}
	conn, err := net.DialTimeout("unix", client.SocketPath(e.home), time.Second)
	if err != nil {
		return e
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return e
	}
	_ = raw.Control(func(fd uintptr) {
		if peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			e.pid = int(peer.Pid)
		}
	})
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(e.pid) + "/stat")
	// The state follows the name, which is in brackets.
	if k := strings.LastIndex(string(stat), ") "); err == nil && k >= 0 {
		e.stopped = strings.HasPrefix(string(stat[k+2:]), "T")
	}
	return e
}
