// Package probe waits until a run of a program is ready: it answers on a port
// or a URL, a command says so, its log shows a line, or it tells by IPC or
// sd_notify itself. It also receives the sd_notify messages ([Listen]).
//
// Invariant: a probe costs nothing while it waits, ends with its context, and
// leaves no process, connection or goroutine behind; whatever the probed side
// sends, memory is bounded.
//
// It must never import a package of Remuda but config, restart or stop what it
// probes, or decide what an unready program means.
package probe

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/internal/config"
)

const (
	defaultInterval = 100 * time.Millisecond
	minInterval     = 10 * time.Millisecond
	// minAttempt is the least that one attempt may take, however short the
	// interval.
	minAttempt = time.Second
	// maxMatch is how much of a log line is matched, in bytes.
	maxMatch = 64 << 10
)

// Env is what a probe needs to know of the run. Which fields are needed is the
// affair of the probe's type; the others may be left zero.
type Env struct {
	// Dir, Environ and Credential are those of the program; an exec probe
	// runs with the same. A nil Environ is an empty environment. A nil
	// Credential leaves the user as it is.
	Dir        string
	Environ    []string
	Credential *syscall.Credential
	// Lines taps the run's log: it calls the function with each line written
	// from now on, from any goroutine, until cancel is called (a call more
	// after that does no harm). For log.
	Lines func(func(string)) (cancel func())
	// IPCReady is closed, or sent to, when the program said "ready". For ipc.
	IPCReady <-chan struct{}
	// NotifyReady is the same for READY=1. For notify.
	NotifyReady <-chan struct{}
}

// ErrUnusable says that the probe cannot be carried out whatever the program
// does: an unknown type, a pattern that is no RE2, a source that Env lacks.
var ErrUnusable = errors.New("probe cannot be used")

// NotReadyError says that the probe's timeout passed.
type NotReadyError struct {
	After    time.Duration // the timeout
	Attempts int           // 0 for probes that only listen
	Last     string        // the last failure in words
}

func (e *NotReadyError) Error() string {
	return fmt.Sprintf("not ready after %s: %s", e.After, e.Last)
}

// Wait returns nil when the run is ready; the context's error when that ends
// first; a [*NotReadyError] when p.Timeout (0: none) passes; an error that is
// [ErrUnusable] at once where waiting would be in vain. The type "none" (or
// "") is ready at once. p.OnTimeout is the caller's affair.
func Wait(ctx context.Context, p config.Probe, env Env) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	wait := ctx
	timeout := time.Duration(p.Timeout)
	if timeout > 0 {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	notReady := func(attempts int, last string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return &NotReadyError{After: timeout, Attempts: attempts, Last: last}
	}
	switch p.Type {
	case "", "none":
		return nil
	case "ipc":
		if env.IPCReady == nil {
			return fmt.Errorf("ipc: the program has no IPC channel: %w", ErrUnusable)
		}
		return listen(wait, env.IPCReady, func() error { return notReady(0, `ipc: no "ready" message came`) })
	case "notify":
		if env.NotifyReady == nil {
			return fmt.Errorf("notify: there is no notify socket: %w", ErrUnusable)
		}
		return listen(wait, env.NotifyReady, func() error { return notReady(0, "notify: no READY=1 came") })
	case "log":
		return waitLog(wait, p.Pattern, env, notReady)
	}
	try, done, err := attempt(p, env)
	if err != nil {
		return err
	}
	defer done()
	return poll(wait, time.Duration(p.Interval), try, notReady)
}

func listen(ctx context.Context, ready <-chan struct{}, late func() error) error {
	select {
	case <-ready:
		return nil
	default:
	}
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return late()
	}
}

func waitLog(ctx context.Context, pattern string, env Env, notReady func(int, string) error) error {
	if env.Lines == nil {
		return fmt.Errorf("log: the program's output is not captured: %w", ErrUnusable)
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return fmt.Errorf("log: pattern %q: %w: %w", pattern, err, ErrUnusable)
	}
	seen := make(chan struct{})
	var once sync.Once
	cancel := env.Lines(func(line string) {
		if len(line) > maxMatch {
			line = line[:maxMatch]
		}
		if re.MatchString(strings.TrimSuffix(line, "\n")) {
			once.Do(func() { close(seen) })
		}
	})
	if cancel != nil {
		defer cancel()
	}
	return listen(ctx, seen, func() error { return notReady(0, fmt.Sprintf("log: no line matched %q", pattern)) })
}

// attempt makes the function that tries once; done frees what it holds.
func attempt(p config.Probe, env Env) (try func(context.Context) error, done func(), err error) {
	nothing := func() {}
	switch p.Type {
	case "tcp":
		if p.Address == "" {
			return nil, nil, fmt.Errorf("tcp: no address: %w", ErrUnusable)
		}
		return func(ctx context.Context) error { return tryTCP(ctx, p.Address) }, nothing, nil
	case "http":
		return newHTTP(p.URL)
	case "exec":
		if len(p.Command) == 0 || p.Command[0] == "" {
			return nil, nil, fmt.Errorf("exec: no command: %w", ErrUnusable)
		}
		return func(ctx context.Context) error { return tryExec(ctx, p.Command, env) }, nothing, nil
	}
	return nil, nil, fmt.Errorf("unknown type %q: %w", p.Type, ErrUnusable)
}

// poll tries at once and then every interval, from the beginning of one
// attempt to that of the next but never overlapping.
func poll(ctx context.Context, interval time.Duration, try func(context.Context) error, notReady func(int, string) error) error {
	if interval <= 0 {
		interval = defaultInterval
	}
	interval = max(interval, minInterval)
	limit := max(interval, minAttempt)
	last := "no attempt ended in time"
	timer := time.NewTimer(0)
	defer timer.Stop()
	for n := 1; ; n++ {
		begun := time.Now()
		one, cancel := context.WithTimeout(ctx, limit)
		err := try(one)
		cancel()
		if err == nil {
			return nil
		}
		// An attempt that the end of the whole wait cut short says less than
		// the one before it.
		if ctx.Err() == nil || n == 1 {
			last = err.Error()
		}
		// A jitter of 10 % keeps a hundred programs that were started
		// together from being probed together.
		next := interval + time.Duration((rand.Float64()-0.5)*0.2*float64(interval)) - time.Since(begun)
		timer.Reset(max(next, minInterval/2))
		select {
		case <-timer.C:
		case <-ctx.Done():
			return notReady(n, last)
		}
	}
}

// took is how long an attempt was given, for "no answer within".
func took(begun time.Time) string {
	d := time.Since(begun)
	if d > time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Millisecond).String()
}

// reason puts a network error in the fewest words that tell: the address is
// said by the caller.
func reason(err error, begun time.Time) string {
	var errno syscall.Errno
	if errors.As(err, &errno) && errno != syscall.ETIMEDOUT {
		return errno.Error()
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, context.Canceled) {
		return "no answer within " + took(begun)
	}
	// The innermost error is the one that says what went wrong.
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}

// words makes foreign output fit for one line of an error message.
func words(b []byte) string {
	s := strings.ToValidUTF8(string(b), "�")
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	out := lines[:0]
	for _, l := range lines {
		l = strings.Map(func(r rune) rune {
			if r == '\t' {
				return ' '
			}
			if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
				return -1
			}
			return r
		}, l)
		if l = strings.TrimSpace(l); l != "" {
			out = append(out, l)
		}
	}
	return strings.Join(out, "; ")
}
