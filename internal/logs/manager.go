package logs

import (
	"context"
	"errors"
	"iter"
	"os"
)

// Manager takes the output of many programs into their logs. Its methods may
// be called from any goroutine.
type Manager struct{}

// New starts a manager. It owns one goroutine and one epoll descriptor until
// Close; writers come and go.
func New(o Options) (*Manager, error) { return nil, errors.ErrUnsupported }

// Close stops taking output, and closes pipes and files. It takes nothing more
// from the pipes and ends no line: who holds the other read ends can attach
// them to another manager, with adopted set. When ctx ends before background
// compression does, it is abandoned (and done again at the next rotation).
func (m *Manager) Close(ctx context.Context) error { return nil }

// Attach takes what comes out of pipe, the read end of a pipe that one run of
// a program writes to, into t until Finish. The manager owns pipe from then
// on, unless it returns an error: then the caller still does (and may attach
// it with a target that discards). adopted says that an earlier manager had
// this very pipe already and was killed or closed: the run's unfinished last
// line is carried on then, where otherwise a new line is begun.
//
// Errors: a path that is relative, or that is a folder, FIFO, socket or device
// other than /dev/null; an unknown Compress; a pipe that is none. A folder or
// file that cannot be written is no error but a Trouble.
func (m *Manager) Attach(src Source, pipe *os.File, t Target, adopted bool) (*Capture, error) {
	return nil, errors.ErrUnsupported
}

// Settle says that every pipe that survived an earlier manager has been
// attached. What that manager had taken of pipes that nobody attached (as when
// the whole machine was restarted) is then written into its log, as of an
// ended run, when that log is used next.
func (m *Manager) Settle() {}

// Reopen closes the log files with these paths (none: all), so that the next
// output opens them anew, as after they were renamed by another program.
func (m *Manager) Reopen(paths ...string) {}

// Flush empties the logs with these paths and removes their rotated files,
// whether something is attached to them or not.
func (m *Manager) Flush(paths ...string) error { return nil }

// Capture is the taking of one stream of one run.
type Capture struct{}

// Finish ends the capture when the run is over: what is in the pipe now goes
// into the log, an unfinished line is ended, the pipe is closed. It does not
// wait for processes that still hold the pipe. Where the log cannot be
// written it tries until ctx ends; what is left then is counted as lost, and
// the error says why. Only the first call does something.
func (c *Capture) Finish(ctx context.Context) error { return nil }

// Tail returns the last n lines of this run, oldest first: of an adopted run
// in a shared log, and of very long lines, perhaps less.
func (c *Capture) Tail(n int) []string { return nil }

// Lines calls f with each line of this run from its attachment on (of an
// adopted run in a log of its own: from the run's beginning, where that is
// still in the file), once each and in order, also with the last one that has
// no newline when the run is finished. It costs a second look at the bytes
// while it lasts. f is called by one goroutine at a time and must not block;
// it may call cancel. Lines replaces an earlier f.
func (c *Capture) Lines(f func(line string)) (cancel func()) { return func() {} }

// Stats tells what was taken so far.
func (c *Capture) Stats() Stats { return Stats{} }

// Source returns the source given to Attach.
func (c *Capture) Source() Source { return Source{} }

// Path returns the file the output goes to, "" where it is discarded.
func (c *Capture) Path() string { return "" }

// Read yields the chosen lines, merged in the order of their time (lines of
// one file always in their own order). An error ends it, except that a file
// that cannot be opened yields its error and the others go on. The end of ctx
// is no error. It only reads files, holds no lock and needs memory for a line
// of each file.
func Read(ctx context.Context, q Query) iter.Seq2[Record, error] { return nil }
