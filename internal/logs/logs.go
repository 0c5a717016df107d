// Package logs captures the standard output and error of supervised programs
// into files, rotates these files, and reads and follows them.
//
// Invariant: whatever a program wrote into its pipe is in its log exactly
// once, in order, also when the process this package runs in is killed with
// SIGKILL at any instant, provided that somebody else (the keeper) holds the
// read end of the pipe open meanwhile and the pipe is attached again with
// adopted set. Only a medium that cannot be written for longer than the pipe
// can wait loses bytes, and these are counted and marked in the log.
//
// How it is kept: bytes leave the pipe by splice(2) only, straight into a file
// whose end is the only record of how far one got; consuming and writing are
// one system call. A log that needs no rewriting (one stream, one file) is that
// file. Where lines must be rewritten or several streams share a file, the
// bytes are spliced into a spool per stream first, and whole lines go from
// there into the log under a checkpoint; after a kill the log is cut back to
// the checkpoint and carried on.
//
// Files beside a log /d/app-out.log:
//
//	/d/app-out.log.000017[.gz|.zst]  rotated; the highest number is the newest
//	/d/.remuda/app-out.log.idx       offset ↔ time, advisory (may be deleted)
//	/d/.remuda/app-out.log.ckpt, *.spool, *.cut, *.next   state of the writer
//
// Readers ([Read]) use files only, so they work without a running writer, and
// never take a lock that a writer could wait for.
//
// The package imports nothing else of Remuda.
package logs

import (
	"os"
	"regexp"
	"time"
)

// Streams of a [Source].
const (
	Out = "out"
	Err = "err"
)

// Defaults that callers may want where their user said nothing.
const (
	DefaultMaxSize = 50 << 20
	DefaultKeep    = 5
	// MaxLine is the length in bytes up to which a line stays whole.
	MaxLine = 1 << 20
)

// Compression of rotated files, see [Target].
const (
	CompressNone = "none"
	CompressGzip = "gzip"
	CompressZstd = "zstd"
)

// Source names where a line comes from.
type Source struct {
	App    string // name of the app
	ID     int    // number of the instance (pm_id)
	Stream string // Out or Err
}

// Target says where the output of a source goes and how.
//
// When several captures have the same Path at the same time, their files'
// form (TimeFormat, JSON) and rotation are those of the first one.
type Target struct {
	// Path of the log file, absolute. "/dev/null", "none" and "" discard. A
	// missing folder is made (0700), the file too (0600).
	Path string
	// TimeFormat, a Go layout, is put before each line, followed by ": ".
	// "" leaves lines as they are. Without meaning where JSON is set.
	TimeFormat string
	// JSON writes each line as an object {time, app, id, stream, text}, with
	// "cut": true where the line goes on in the next.
	JSON bool
	// Shared announces that several sources write into Path. It is a hint: a
	// second source on the same path is always recognized, but the change
	// costs a little while the first is writing.
	Shared bool
	// MaxSize is the size in bytes at which a file is rotated; ≤ 0: never.
	MaxSize int64
	// MaxAge is the age at which a file is rotated, looked at when something
	// is written; ≤ 0: never.
	MaxAge time.Duration
	// Keep is how many rotated files stay; 0 keeps none.
	Keep int
	// Compress is CompressNone, CompressGzip or CompressZstd; "" is none.
	// It happens in the background.
	Compress string
}

// Trouble says that output of a source cannot be written, or can again.
type Trouble struct {
	Source Source
	Path   string
	Err    error // nil: writing works again
	Lost   int64 // bytes of this source thrown away so far (since Attach)
}

// Stats is what a [Capture] did since Attach.
type Stats struct {
	Bytes  int64     // taken from the pipe into files (or discarded on demand)
	Lost   int64     // thrown away because they could not be written
	Err    error     // why output cannot be written at the moment; nil: it can
	Last   time.Time // when the last output was taken; zero: none yet
	EOF    bool      // all writers of the pipe have closed it
	Direct bool      // pipe → log without a spool between
}

// Options configures a [Manager]. The zero value is useful.
type Options struct {
	// Now tells the time; default time.Now.
	Now func() time.Time
	// OnTrouble is called when writing a source's output fails for the first
	// time, when bytes are lost (at most once a second), and when it works
	// again. It is called without locks held, one call at a time a source,
	// and must not block for long.
	OnTrouble func(Trouble)
	// Relay is asked for a second pipe for a source that writes very much (see
	// relay.go): the read end of an empty one of which the caller keeps
	// another descriptor for whoever comes after this process, to be given to
	// [Manager.Adopt]. pipe is the inode of the source's own pipe, which tells
	// two runs of one source apart. Unrelay says that it is not needed any
	// more. Both must not block for long. nil: programs that write much wait
	// more often.
	Relay   func(src Source, pipe uint64) (*os.File, error)
	Unrelay func(src Source, pipe uint64)
	// Writers is the number of goroutines that write; default 4. They exist
	// only while there is something to write. A slow disk holds up only the
	// logs that share its writer.
	Writers int
	// IdleClose is how long after the last output a log file is closed;
	// default 30 s.
	IdleClose time.Duration
	// MaxOpen bounds how many log files are open at a time (each needs two to
	// four descriptors); default 1024, or 256 where few may be open.
	MaxOpen int
}

// QueryFile is one log to read, with all its rotated files.
type QueryFile struct {
	Source     Source // put into each [Record]; a JSON log names its own
	Path       string // as in [Target]; one that discards has no lines
	JSON       bool   // as in [Target]
	TimeFormat string // as in [Target]
}

// Query chooses lines. A path named by several files is read once: a JSON log
// then gives the lines of these sources only, another log is given the first
// one's Source.
type Query struct {
	Files []QueryFile
	// Lines is how many of the last lines that match the rest of the query
	// are wanted of each file; < 0: all; 0: none (useful with Follow).
	Lines int
	Since time.Time      // zero: from the beginning; inclusive
	Until time.Time      // zero: to the end; inclusive
	Grep  *regexp.Regexp // nil: every line
	// Follow waits for more output after the end, until the context ends or
	// Until has passed. A file that does not exist yet is waited for too.
	Follow bool
}

// Record is one line of a log.
type Record struct {
	// Time is when the line was read from the program, exact to about 100 ms
	// where it comes from the index; the log's own time where it carries one
	// (TimeFormat, JSON); the file's time of modification where nothing is
	// known.
	Time   time.Time
	Source Source
	Text   string // without its newline; invalid UTF-8 as U+FFFD
	Cut    bool   // the line goes on in the next record, or had not ended yet
}
