// Package cli is the command line: commands, flags, tables and words.
//
// Invariant: it knows the daemon by package client alone, and everything that
// comes from elsewhere (names, log lines, errors) is made harmless before it
// reaches a terminal. What a program may want to read goes to standard output,
// what is said to a person about it to standard error.
//
// It must never import the daemon, the API server or anything that runs
// processes, but for packages pool and batch, since `remuda pool run` needs no
// daemon.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// The exit codes of remuda.
const (
	ExitOK          = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitNoTarget    = 3
	ExitUnreachable = 4
	ExitTimedOut    = 124
	ExitInterrupted = 130
)

// Options are what the command line has of the outside world.
type Options struct {
	Args           []string // without the program's own name
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Version        string
	Environ        []string         // nil: the process's own
	Cwd            string           // "": the process's own
	Extra          []*cobra.Command // further commands: the modes of the daemon
}

// ExitError is an error with an exit code of its own. Where Err is nil, what
// went wrong has been said already and nothing more is printed.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("exit code %d", e.Code)
	}
	return e.Err.Error()
}

func (e *ExitError) Unwrap() error { return e.Err }

// errFailed is the end of a command that has told its failures itself.
var errFailed = &ExitError{Code: ExitFailed}

// usageError is a command line that cannot be understood.
type usageError struct{ text, hint string }

func (e *usageError) Error() string { return e.text }

func usage(hint, format string, args ...any) error {
	return &usageError{text: fmt.Sprintf(format, args...), hint: hint}
}

// hinted is an error with a word on what to do about it.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// Main carries out one command line and returns the exit code. Interrupts are
// caught while a command of this package runs, and not before: the modes of
// the daemon in o.Extra have their own way with signals.
func Main(ctx context.Context, o Options) int {
	if o.Stdin == nil {
		o.Stdin = os.Stdin
	}
	if o.Stdout == nil {
		o.Stdout = os.Stdout
	}
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	out := &output{Writer: o.Stdout}
	o.Stdout = out
	c := &cli{Options: o}
	c.Args = protectNegative(o.Args)
	root := c.root()
	root.SetArgs(c.Args)
	err := root.ExecuteContext(ctx)
	if c.client != nil {
		c.client.Close()
	}
	if err == nil && out.err != nil {
		err = fmt.Errorf("what there is to say cannot be written: %w", out.err)
	}
	return c.exit(err)
}

// output remembers that something could not be written, so that not every
// caller has to look: a full disk must not end as a success.
type output struct {
	io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.Writer.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

// cli is one run of the command line.
type cli struct {
	Options
	home    string // --home
	json    bool
	noColor bool
	silent  bool
	timeout time.Duration

	client      *client.Client
	interrupted bool
	following   atomic.Bool // a stream is followed, in which silence is nothing special
}

// exit says what went wrong and what to do, and gives the exit code.
func (c *cli) exit(err error) int {
	if err == nil {
		return ExitOK
	}
	var (
		own  *ExitError
		bad  *usageError
		hint hinted
		conf *config.Error
	)
	switch {
	case c.interrupted && errors.Is(err, context.Canceled):
		c.say("interrupted")
		return ExitInterrupted
	case errors.As(err, &own):
		if own.Err != nil {
			c.say("%s", own.Err)
		}
		return own.Code
	case errors.As(err, &bad):
		c.say("%s", bad.text)
		if bad.hint != "" {
			fmt.Fprintln(c.Stderr, bad.hint)
		}
		return ExitUsage
	case errors.As(err, &conf):
		for _, p := range conf.Problems {
			c.say("%s", p)
		}
		return ExitFailed
	}
	code, what := ExitFailed, ""
	switch {
	case c.timeout > 0 && errors.Is(err, context.DeadlineExceeded):
		c.say("timed out after %s (--timeout); what was asked may still come about: see `remuda list`", c.timeout)
		return ExitTimedOut
	case errors.Is(err, client.ErrNoTarget):
		code, what = ExitNoTarget, "`remuda list` shows what there is."
	case errors.Is(err, client.ErrUnreachable):
		code = ExitUnreachable
		if !errors.Is(err, os.ErrPermission) && !headless(err) {
			what = "`remuda start …` or `remuda up` starts one; `remuda doctor` looks for trouble."
		}
	case errors.Is(err, config.ErrNotFound):
		what = "`remuda init` writes one to begin with; -f FILE names another."
	}
	var call *os.SyscallError
	if errors.As(err, &call) && call.Syscall == "getwd" {
		what = "The folder you are in is gone: cd to one that exists."
	}
	if errors.As(err, &hint) {
		what = hint.hint
	}
	c.say("%s", err)
	if what != "" && !strings.Contains(err.Error(), strings.Trim(what, "`.")) && !strings.Contains(err.Error(), "`remuda list`") {
		fmt.Fprintln(c.Stderr, what)
	}
	return code
}

// headless says whether there is a daemon whose controller does not come up,
// which starting another does not help.
func headless(err error) bool {
	return errors.Is(err, client.ErrUnreachable) && strings.Contains(err.Error(), "its keeper lives")
}

// say prints a line for a person on standard error.
func (c *cli) say(format string, args ...any) {
	fmt.Fprintln(c.Stderr, "remuda: "+clean(fmt.Sprintf(format, args...), maxMessage))
}

func (c *cli) warn(text string) { c.say("warning: %s", text) }

// warnings prints what config has to say about what it has read.
func (c *cli) warnings(list []config.Warning) {
	for _, w := range list {
		c.warn(w.String())
	}
}

func (c *cli) printf(format string, args ...any) { fmt.Fprintf(c.Stdout, format, args...) }

// writeJSON prints v for programs, indented where a person looks on.
func (c *cli) writeJSON(v any) error {
	enc := json.NewEncoder(c.Stdout)
	enc.SetEscapeHTML(false)
	if c.isTerminal(c.Stdout) {
		enc.SetIndent("", "  ")
	}
	return enc.Encode(v)
}

// getenv looks a variable up in the caller's environment.
func (c *cli) getenv(name string) string {
	if c.Environ == nil {
		return os.Getenv(name)
	}
	for i := len(c.Environ) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(c.Environ[i], name+"="); ok {
			return v
		}
	}
	return ""
}

func (c *cli) environ() []string {
	if c.Environ == nil {
		return os.Environ()
	}
	return c.Environ
}

// abs makes a path absolute, against the caller's working directory.
func (c *cli) abs(path string) (string, error) {
	if filepath.IsAbs(path) || c.Cwd == "" {
		return filepath.Abs(path)
	}
	return filepath.Join(c.Cwd, path), nil
}

func (c *cli) cwd() (string, error) {
	if c.Cwd != "" {
		return c.Cwd, nil
	}
	return os.Getwd()
}

// homeDir is the daemon's folder: --home, $REMUDA_HOME, ~/.remuda.
func (c *cli) homeDir() (string, error) {
	for _, h := range []string{c.home, c.getenv("REMUDA_HOME")} {
		if h != "" {
			return c.abs(h)
		}
	}
	return client.Home()
}

// dial makes the client of the daemon; it does not connect.
func (c *cli) dial() error {
	if c.client != nil {
		return nil
	}
	home, err := c.homeDir()
	if err != nil {
		return err
	}
	c.client = client.New(home)
	return nil
}

// launchLimit is how long a daemon may take to answer for the first time.
const launchLimit = 30 * time.Second

// launch makes sure that a daemon runs.
func (c *cli) launch(ctx context.Context) error {
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot tell which program the daemon is: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, launchLimit)
	defer cancel()
	started, err := c.client.Launch(limited, binary)
	if err != nil {
		if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
			return &ExitError{Code: ExitUnreachable, Err: err}
		}
		return err
	}
	if started && !c.silent && !c.json {
		c.say("started the daemon in %s", c.client.Home())
	}
	return nil
}

// need says what a command needs of the daemon.
type need int

const (
	needNothing need = iota
	needClient       // a client; whether a daemon answers is the command's matter
	needDaemon       // a running daemon, launched where there is none
)

type runFunc func(ctx context.Context, args []string) error

// run wraps what a command does: interrupts and --timeout end its context, and
// what it needs of the daemon is there.
func (c *cli) run(n need, f runFunc) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		defer stop()
		// A second ctrl-C ends the command at once.
		defer context.AfterFunc(ctx, stop)()
		if c.timeout < 0 {
			return usage("", "--timeout %s: must not be negative", c.timeout)
		}
		limited := ctx
		if c.timeout > 0 {
			var cancel context.CancelFunc
			limited, cancel = context.WithTimeout(ctx, c.timeout)
			defer cancel()
		}
		if n == needNothing {
			err := f(limited, args)
			c.interrupted = ctx.Err() != nil
			return err
		}
		if err := c.dial(); err != nil {
			return err
		}
		err := c.guarded(limited, pulseEvery, pulseLimit, func(ctx context.Context) error {
			if n == needDaemon {
				if err := c.launch(ctx); err != nil {
					return err
				}
			}
			return f(ctx, args)
		})
		c.interrupted = ctx.Err() != nil
		return err
	}
}
