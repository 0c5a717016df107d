package batch

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Log is a job log: a file to which a line of JSON is appended whenever a task
// has ended and its result has been written. A run that was killed, at whatever
// instant, is resumed from it.
//
// A line is one of
//
//	{"run": {…}}                      a run begins
//	{"seq": 7, "ok": true, …, "end": 4711}   task 7 has ended and its result is written
//	{"seq": 7, "ok": true, …, "held": {…}}   it has ended; its result waits in the spool for an earlier task's
//	{"seq": 7, "end": 4711}            that result is written now
//
// where end is the size of the results' file after it. A last line without its
// newline counts for nothing. The spool is the file beside it with ".held".
type Log struct {
	path   string
	f      *os.File
	resume bool

	sums   []uint32 // of the tasks, by number, from 1 at 0
	states []uint8
	last   *runRecord
	end    int64 // of the results as far as the log goes, -1 where they are not known
	gone   int64 // tasks whose results are in the log and not in the results' file

	mu       sync.Mutex     // guards what follows from the one that reads tasks
	held     map[int64]span // results that wait in the spool
	spoolEnd int64

	spool    *os.File
	spoolLow int64 // what is below has been given back
	spoolAim int64 // when it has grown so far there may be something to give back
	spoolBuf bytes.Buffer
	buf      bytes.Buffer
	err      error
}

// What the log knows of a task.
const (
	isLogged = 1 << iota
	isWritten
	isFailed
)

// span is a piece of the spool.
type span struct {
	At  int64  `json:"at"`
	Len int64  `json:"len"`
	Sum uint32 `json:"sum"`
}

type record struct {
	Run *runRecord `json:"run,omitempty"`

	Seq     int64    `json:"seq,omitempty"`
	OK      *bool    `json:"ok,omitempty"`
	Task    string   `json:"task,omitempty"` // how it begins
	Sum     string   `json:"sum,omitempty"`
	Start   string   `json:"start,omitempty"`
	Seconds float64  `json:"seconds,omitempty"`
	PID     int      `json:"pid,omitempty"`
	Tries   int      `json:"attempts,omitempty"`
	Error   *Failure `json:"error,omitempty"`
	Held    *span    `json:"held,omitempty"`
	End     *int64   `json:"end,omitempty"`
}

type runRecord struct {
	PID     int       `json:"pid"`
	Tag     string    `json:"tag"` // of its processes
	At      string    `json:"at"`
	Command []string  `json:"command"`
	Results *fileSize `json:"results,omitempty"` // nil: not a regular file
}

// fileID tells a file from others, whatever it is called.
type fileID struct {
	Dev uint64 `json:"dev"`
	Ino uint64 `json:"ino"`
}

// fileSize is a file as it was when a run began.
type fileSize struct {
	fileID
	Size int64 `json:"size"`
}

func identify(f *os.File) (*fileID, int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, 0, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, 0, nil
	}
	return &fileID{st.Dev, st.Ino}, st.Size, nil
}

// Bounds of a job log, so that one that is none cannot take all memory.
const (
	maxLogLine = 64 << 10
	// More tasks are never under way or waiting to be written.
	maxAhead = maxWindow + 2*maxHeld
	// So long a lock is waited for.
	lockWait = 300 * time.Millisecond
	// So much the spool may grow before room in it is given back.
	spoolKeep = 16 << 20

	// logBegins is how a job log begins.
	logBegins = `{"run":{"pid":`

	clipTask = 120
	clipText = 500
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sum(task []byte) uint32 { return crc32.Checksum(task, castagnoli) }

// ErrLog is a job log that cannot be used as it is; what to do is in the text.
type ErrLog struct{ Text, Hint string }

func (e *ErrLog) Error() string { return e.Text }

func badLog(hint, format string, args ...any) error {
	return &ErrLog{fmt.Sprintf(format, args...), hint}
}

// OpenLog opens the job log at path, made where there is none, and locks it. One
// that has something in it is an error unless the run is to be resumed. results
// is where results go, nil where that is no file.
func OpenLog(path string, resume bool, results *os.File) (*Log, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o666)
	if err != nil {
		return nil, fmt.Errorf("cannot open the job log: %w", err)
	}
	l := &Log{path: path, f: f, resume: resume, held: map[int64]span{}, end: -1}
	if err := l.open(results); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (l *Log) open(results *os.File) error {
	if id, _, err := identify(l.f); err != nil || id == nil {
		return badLog("", "the job log %s is not a regular file", l.path)
	}
	err := unix.Flock(int(l.f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	// A run that was killed while it started a worker: the lock lasts until that
	// has been executed.
	for end := time.Now().Add(lockWait); errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		err = unix.Flock(int(l.f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return badLog("Give each run a log of its own, or wait until the other has ended.", "the job log %s is in use by another `remuda pool run`", l.path)
		}
		return fmt.Errorf("cannot lock the job log %s: %w", l.path, err)
	}
	var (
		id   *fileID
		size int64
	)
	if results != nil {
		var err error
		if id, size, err = identify(results); err != nil {
			return fmt.Errorf("cannot look at the results: %w", err)
		}
		if own, _, err := identify(l.f); err == nil && id != nil && *own == *id {
			return badLog("", "the job log and the results are the same file, %s", l.path)
		}
	}
	spool, err := os.OpenFile(l.path+".held", os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return fmt.Errorf("cannot open the spool of the job log: %w", err)
	}
	l.spool, l.spoolAim = spool, spoolKeep
	if _, l.spoolEnd, err = identify(spool); err != nil {
		return err
	}
	good, err := l.read(l.f, id, size)
	if err != nil {
		return err
	}
	if err := l.f.Truncate(good); err != nil {
		return fmt.Errorf("cannot cut off the torn last line of the job log: %w", err)
	}
	return nil
}

// read takes in what earlier runs have logged, in a file that begins with good
// bytes of whole lines. results has size bytes.
func (l *Log) read(from io.Reader, results *fileID, size int64) (good int64, err error) {
	in := bufio.NewReaderSize(from, maxLogLine)
	same := false // results are the file of the run that is read
	for n := 1; ; n++ {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			if n == 1 && len(line) > 0 && !strings.HasPrefix(logBegins, string(line[:min(len(line), len(logBegins))])) {
				return 0, l.notOurs()
			}
			break
		}
		var r record
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return 0, l.broken(n)
		case err != nil:
			return 0, fmt.Errorf("cannot read the job log %s: %w", l.path, err)
		case json.Unmarshal(line, &r) != nil || r.Run == nil && (n == 1 || !l.take(&r, same, size)):
			if n == 1 {
				return 0, l.notOurs()
			}
			return 0, l.broken(n)
		}
		if n == 1 && !l.resume {
			return 0, badLog(fmt.Sprintf("--resume goes on where it stopped. To begin anew, remove %s.", l.path), "the job log %s is there already", l.path)
		}
		good += int64(len(line))
		if r.Run != nil {
			l.last = r.Run
			l.end = -1
			if same = results != nil && r.Run.Results != nil && r.Run.Results.fileID == *results; same {
				l.end = r.Run.Results.Size
			}
		}
	}
	if same && l.gone > 0 && size == 0 {
		return 0, badLog("A resumed run appends: use --results FILE, or >> instead of > in the shell. To begin anew, remove "+l.path+".",
			"the results that the job log %s speaks of are gone: the file is empty", l.path)
	}
	return good, nil
}

func (l *Log) notOurs() error {
	return badLog("Name another file.", "%s is not a job log of `remuda pool run`: nothing is done to it", l.path)
}

func (l *Log) broken(n int) error {
	return badLog("Repair or remove that line, or remove the file to begin anew.", "line %d of the job log %s cannot be read", n, l.path)
}

// take takes in a line about a task; it reports whether it makes sense.
func (l *Log) take(r *record, same bool, size int64) bool {
	if r.Seq < 1 || r.Seq > int64(len(l.sums))+maxAhead || r.End == nil && r.Held == nil {
		return false
	}
	if n := r.Seq - int64(len(l.sums)); n > 0 {
		l.sums, l.states = append(l.sums, make([]uint32, n)...), append(l.states, make([]uint8, n)...)
	}
	state := &l.states[r.Seq-1]
	if r.OK != nil {
		n, err := strconv.ParseUint(r.Sum, 16, 32)
		if err != nil {
			return false
		}
		l.sums[r.Seq-1], *state = uint32(n), isLogged
		if !*r.OK {
			*state |= isFailed
		}
		delete(l.held, r.Seq)
	} else if _, waits := l.held[r.Seq]; !waits {
		return false
	}
	switch {
	case r.End == nil:
		l.held[r.Seq] = *r.Held
	case same && *r.End > size:
		delete(l.held, r.Seq)
		*state = 0
		l.gone++
	default:
		delete(l.held, r.Seq)
		*state |= isWritten
		if same {
			l.end = *r.End
		}
	}
	return true
}

// Resumed says what the log knows of: how many tasks have ended, how many of
// them in failure, and whether a run has begun before at all.
func (l *Log) Resumed() (done, failed int64, before bool) {
	for _, s := range l.states {
		if s&isLogged != 0 {
			done++
		}
		if s&isFailed != 0 {
			failed++
		}
	}
	return done, failed, l.last != nil
}

// Gone is how many tasks are done anew because their results are missing at the
// end of the results' file.
func (l *Log) Gone() int64 { return l.gone }

// state is what the log knows of a task: a sum and a state of 0 where that is
// nothing.
func (l *Log) state(seq int64) (sum uint32, state uint8) {
	if l == nil || seq > int64(len(l.states)) {
		return 0, 0
	}
	return l.sums[seq-1], l.states[seq-1]
}

// waiting reads the result of a task from the spool. ok is false where it is not
// there any more, after a power cut, say.
func (l *Log) waiting(seq int64) (b []byte, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at, ok := l.held[seq]
	if !ok || at.At < 0 || at.Len < 0 || at.At > l.spoolEnd-at.Len {
		return nil, false
	}
	b = make([]byte, at.Len)
	_, err := l.spool.ReadAt(b, at.At)
	return b, err == nil && sum(b) == at.Sum
}

// begin logs that a run begins.
func (l *Log) begin(tag string, command []string, results *os.File) error {
	r := &runRecord{PID: os.Getpid(), Tag: tag, At: stamp(time.Now()), Command: command}
	if results != nil {
		id, size, err := identify(results)
		if err != nil {
			return err
		}
		if id != nil {
			r.Results = &fileSize{*id, size}
		}
	}
	encode(&l.buf, record{Run: r})
	if l.buf.Len() >= maxLogLine {
		r.Command = []string{clip(command[0], clipText), "…"}
		l.buf.Reset()
		encode(&l.buf, record{Run: r})
	}
	return l.commit(false)
}

// wrote logs that a task's result is written, up to end.
func (l *Log) wrote(it *item, end int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if it.logged {
		encode(&l.buf, record{Seq: it.out.Seq, End: &end})
		delete(l.held, it.out.Seq)
		return
	}
	r := it.record()
	r.End = &end
	encode(&l.buf, r)
}

// hold logs that a task has ended whose result has to wait.
func (l *Log) hold(it *item) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := span{l.spoolEnd + int64(l.spoolBuf.Len()), int64(len(it.line)), sum(it.line)}
	l.spoolBuf.Write(it.line)
	l.held[it.out.Seq] = at
	it.logged = true
	r := it.record()
	r.Held = &at
	encode(&l.buf, r)
}

func (it *item) record() record {
	o := &it.out
	ok := o.Failure == nil
	r := record{
		Seq: o.Seq, OK: &ok, Task: clip(text(o.Task[:min(len(o.Task), clipTask+4)]), clipTask), Sum: fmt.Sprintf("%08x", it.sum),
		Seconds: o.Took.Seconds(), PID: o.PID, Tries: o.Attempts,
	}
	if !o.Start.IsZero() {
		r.Start = stamp(o.Start)
	}
	if o.Failure != nil {
		r.Error = &Failure{Kind: o.Failure.Kind, Message: clip(text([]byte(o.Failure.Message)), clipText), Code: clip(o.Failure.Code, clipTask)}
	}
	return r
}

func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// commit writes what was logged; results are in their file by then. With sync
// it is on the disk when commit returns.
func (l *Log) commit(sync bool) error {
	if l.err != nil {
		return l.err
	}
	l.err = l.write(sync)
	return l.err
}

func (l *Log) write(sync bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spoolBuf.Len() > 0 {
		n, err := l.spool.WriteAt(l.spoolBuf.Bytes(), l.spoolEnd)
		l.spoolEnd += int64(n)
		l.spoolBuf.Reset()
		if err == nil && sync {
			err = unix.Fdatasync(int(l.spool.Fd()))
		}
		if err != nil {
			return fmt.Errorf("cannot write to the spool of the job log: %w", err)
		}
	}
	if l.buf.Len() > 0 {
		_, err := l.f.Write(l.buf.Bytes())
		l.buf.Reset()
		if err == nil && sync {
			err = unix.Fdatasync(int(l.f.Fd()))
		}
		if err != nil {
			return fmt.Errorf("cannot write to the job log: %w", err)
		}
	}
	// Only now that the log says so, the spool may lose what has been written.
	switch {
	case len(l.held) == 0 && l.spoolEnd > 0:
		if err := l.spool.Truncate(0); err != nil {
			return fmt.Errorf("cannot empty the spool of the job log: %w", err)
		}
		l.spoolEnd, l.spoolLow, l.spoolAim = 0, 0, spoolKeep
	case l.spoolEnd > l.spoolAim:
		low := l.spoolEnd
		for _, at := range l.held {
			low = min(low, at.At)
		}
		if low > l.spoolLow {
			// Where a file cannot have holes it takes more room, no more.
			_ = unix.Fallocate(int(l.spool.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, l.spoolLow, low-l.spoolLow)
			l.spoolLow = low
		}
		l.spoolAim = l.spoolEnd + spoolKeep
	}
	return nil
}

// Close unlocks the log. A spool that holds nothing is removed.
func (l *Log) Close() {
	if l.spool != nil {
		if len(l.held) == 0 && l.err == nil {
			_ = os.Remove(l.spool.Name()) // empty, it does no harm
		}
		l.spool.Close()
	}
	l.f.Close()
}
