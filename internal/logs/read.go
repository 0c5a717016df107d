package logs

import (
	"bytes"
	"compress/gzip"
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	lineLimit = MaxLine + 4096   // with a timestamp and a mark
	jsonLimit = 6*MaxLine + 4096 // with each byte escaped
)

// Read yields the chosen lines, merged in the order of their time (lines of
// one file always in their own order). An error ends nothing: a file that
// cannot be read yields its error once, and the others go on; a query that
// cannot be carried out yields one error. The end of ctx is no error. Read
// only reads files, holds no lock and needs memory for a line of each file.
func Read(ctx context.Context, q Query) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		r := &reading{q: q, ctx: ctx}
		defer r.close()
		r.run(yield)
	}
}

// reading is one call of Read.
type reading struct {
	ctx     context.Context
	q       Query
	streams []*stream
	byName  map[string]*stream // path → stream
	heads   heads
	watch   *watcher
}

// heads orders streams by the time of their next record.
type heads []*stream

func (h heads) Len() int { return len(h) }
func (h heads) Less(i, j int) bool {
	if h[i].key.Equal(h[j].key) {
		return h[i].nr < h[j].nr
	}
	return h[i].key.Before(h[j].key)
}
func (h heads) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *heads) Push(x any) {
	s, _ := x.(*stream)
	*h = append(*h, s)
}
func (h *heads) Pop() any {
	old := *h
	s := old[len(old)-1]
	*h = old[:len(old)-1]
	return s
}

func (r *reading) close() {
	for _, s := range r.streams {
		s.close()
	}
	if r.watch != nil {
		r.watch.close()
	}
}

func (r *reading) run(yield func(Record, error) bool) {
	r.byName = map[string]*stream{}
	for _, f := range r.q.Files {
		if discards(f.Path) {
			continue
		}
		if !filepath.IsAbs(f.Path) {
			if !yield(Record{}, fmt.Errorf("log path %q is relative: give an absolute one", f.Path)) {
				return
			}
			continue
		}
		path := filepath.Clean(f.Path)
		s := r.byName[path]
		if s == nil {
			s = &stream{path: path, names: namesOf(path), nr: len(r.streams), q: &r.q, form: f}
			r.byName[path] = s
			r.streams = append(r.streams, s)
		}
		s.sources = append(s.sources, f.Source)
	}
	if len(r.streams) == 0 {
		return
	}
	for _, s := range r.streams {
		s.bufSize = max(4<<10, min(64<<10, (4<<20)/len(r.streams)))
	}
	ctx := r.ctx
	if r.q.Follow {
		if !r.q.Until.IsZero() {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, r.q.Until)
			defer cancel()
		}
		// Watched before it is read: what comes between is an event.
		w, err := newWatcher(r.streams)
		if err != nil {
			yield(Record{}, err)
			return
		}
		r.watch = w
		stop := context.AfterFunc(ctx, w.interrupt)
		defer stop()
	}
	for _, s := range r.streams {
		if r.ctx.Err() != nil {
			return
		}
		if err := s.begin(); err != nil && !yield(Record{}, err) {
			return
		}
		if !r.more(s, yield) {
			return
		}
	}
	for n := 1; ; n++ {
		if len(r.heads) > 0 {
			s := r.heads[0]
			if !yield(s.head, nil) || r.ctx.Err() != nil {
				return
			}
			s.head = Record{}
			heap.Pop(&r.heads)
			s.queued = false
			if !r.more(s, yield) {
				return
			}
		}
		if r.watch == nil {
			if len(r.heads) == 0 {
				return
			}
			continue
		}
		if len(r.heads) > 0 && n%128 != 0 {
			continue
		}
		dirty, err := r.watch.wait(len(r.heads) == 0)
		if ctx.Err() != nil && len(r.heads) == 0 {
			return
		}
		if err != nil {
			yield(Record{}, err)
			return
		}
		for _, s := range dirty {
			if !s.queued && !r.more(s, yield) {
				return
			}
		}
	}
}

// more gets the next record of s into the heap, where there is one.
func (r *reading) more(s *stream, yield func(Record, error) bool) bool {
	ok, err := s.next(r.ctx)
	if err != nil && !s.failed {
		s.failed = true
		if !yield(Record{}, err) {
			return false
		}
	}
	if ok {
		s.queued = true
		heap.Push(&r.heads, s)
	}
	return true
}

// stream reads one log: rotated files from the oldest to the newest, then the
// log itself.
type stream struct {
	names
	path    string
	nr      int
	q       *Query
	form    QueryFile
	sources []Source
	bufSize int

	rot    []rotatedFile // to be read before the log
	cur    *lineFile     // one of them, or the log
	log    *lineFile     // the log, open from the beginning so that a rotation cannot take it away
	own    int64         // number that the log gets when it is rotated
	head   Record
	key    time.Time // never falls
	queued bool
	failed bool
}

func (s *stream) close() {
	s.cur.close()
	if s.log != s.cur {
		s.log.close()
	}
	s.cur, s.log = nil, nil
}

// open lists the rotated files after number and opens the log such that both
// fit together.
func (s *stream) open(after int64) error {
	for try := 0; ; try++ {
		list, err := s.list()
		if err != nil {
			return fmt.Errorf("cannot list the rotated files of %s: %w", s.path, err)
		}
		f, err := s.openLog()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		again, err := s.list()
		if err != nil {
			f.close()
			return fmt.Errorf("cannot list the rotated files of %s: %w", s.path, err)
		}
		if lastSeq(list) != lastSeq(again) && try < 20 {
			f.close()
			continue
		}
		s.own = lastSeq(list) + 1
		for len(list) > 0 && list[0].seq <= after {
			list = list[1:]
		}
		s.rot, s.log = list, f
		return nil
	}
}

func lastSeq(l []rotatedFile) int64 {
	if len(l) == 0 {
		return 0
	}
	return l[len(l)-1].seq
}

func (s *stream) openLog() (*lineFile, error) {
	fd, err := openFile(s.path, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("cannot read log: %w", err)
	}
	f := &lineFile{fd: fd, size: s.bufSize, limit: s.limit()}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		f.close()
		return nil, fmt.Errorf("cannot read log %s: not a regular file", s.path)
	}
	f.ino, f.mtime = st.Ino, time.Unix(st.Mtim.Unix())
	f.idx = openIndex(s.state(".idx"), st.Ino, true)
	return f, nil
}

func (s *stream) limit() int {
	if s.form.JSON {
		return jsonLimit
	}
	return lineLimit
}

// openRotated returns nil where the file has gone meanwhile.
func (s *stream) openRotated(r rotatedFile) (*lineFile, error) {
	for _, suffix := range []string{r.suffix, "", ".gz", ".zst"} {
		path := s.rotated(r.seq) + suffix
		fd, err := openFile(path, unix.O_RDONLY)
		if errors.Is(err, unix.ENOENT) {
			continue // it may have been compressed
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read log: %w", err)
		}
		f := &lineFile{fd: fd, size: s.bufSize, limit: s.limit(), final: true}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			f.close()
			return nil, fmt.Errorf("cannot read log %s: not a regular file", path)
		}
		f.ino, f.mtime = st.Ino, time.Unix(st.Mtim.Unix())
		if suffix != "" {
			if err := f.unpack(suffix); err != nil {
				f.close()
				return nil, fmt.Errorf("cannot read log %s: %w", path, err)
			}
		}
		f.idx = openIndex(s.rotatedIndex(r.seq), 0, false)
		return f, nil
	}
	return nil, nil
}

func (s *stream) filtered() bool {
	return s.q.Grep != nil || !s.q.Since.IsZero() || !s.q.Until.IsZero() || s.form.JSON
}

// begin opens the files and finds where to start.
func (s *stream) begin() error {
	if err := s.open(0); err != nil {
		return err
	}
	if !s.q.Since.IsZero() {
		// A second for clocks and file systems that are not that exact.
		for len(s.rot) > 0 {
			var st unix.Stat_t
			if unix.Lstat(s.file(s.rot[0]), &st) != nil || !time.Unix(st.Mtim.Unix()).Add(time.Second).Before(s.q.Since) {
				break
			}
			s.rot = s.rot[1:]
		}
		s.log.seekTime(s.q.Since)
	}
	if s.log != nil {
		s.log.final = !s.q.Follow // does its unfinished line count?
	}
	if s.q.Lines < 0 {
		return nil
	}
	need := s.q.Lines
	var err error
	if s.log != nil && need >= 0 {
		var n int
		if n, err = s.position(s.log, need); err != nil {
			return err
		}
		need -= n
	}
	i := len(s.rot)
	for i > 0 && need > 0 {
		f, err := s.openRotated(s.rot[i-1])
		if err != nil {
			return err
		}
		i--
		if f == nil {
			continue
		}
		n, err := s.position(f, need)
		if err != nil {
			f.close()
			return err
		}
		need -= n
		if need > 0 {
			f.close()
		} else {
			s.cur = f
		}
	}
	if s.cur != nil {
		s.rot = s.rot[i+1:]
	} else {
		s.rot = s.rot[i:]
	}
	return nil
}

// position sets f so that its last n matching lines follow, and returns how
// many these are. f must be at its beginning, or where seekTime set it.
func (s *stream) position(f *lineFile, n int) (int, error) {
	if n == 0 {
		var st unix.Stat_t
		if err := unix.Fstat(f.fd, &st); err != nil {
			return 0, err
		}
		off, _, err := lastNewline(f.fd, st.Size)
		f.seek(off)
		return 0, err
	}
	if !s.filtered() && f.dec == nil {
		var st unix.Stat_t
		if err := unix.Fstat(f.fd, &st); err != nil {
			return 0, err
		}
		off, k, err := linesFromEnd(f.fd, st.Size, n)
		f.seek(off)
		return k, err
	}
	start := f.off
	total := 0
	end := int64(-1)
	if f.dec == nil {
		var st unix.Stat_t
		if err := unix.Fstat(f.fd, &st); err != nil {
			return 0, err
		}
		end = st.Size
	}
	for end < 0 || f.off < end {
		_, hit, ok, err := s.record(f)
		if err != nil {
			return 0, fmt.Errorf("cannot read log %s: %w", s.path, err)
		}
		if !ok {
			break
		}
		if hit {
			total++
		}
	}
	if err := f.rewind(start); err != nil {
		return 0, err
	}
	f.skip = max(0, total-n)
	return min(n, total), nil
}

// linesFromEnd returns the offset of the last n lines and how many there are.
func linesFromEnd(fd int, size int64, n int) (off int64, lines int, err error) {
	if n == 0 || size == 0 {
		return size, 0, nil
	}
	b := make([]byte, 16<<10)
	for end := size; end > 0; {
		k := min(int64(len(b)), end)
		if _, err := preadFull(fd, b[:k], end-k); err != nil {
			return 0, 0, err
		}
		for i := k - 1; i >= 0; i-- {
			at := end - k + i
			if b[i] != '\n' || at == size-1 {
				continue
			}
			if lines++; lines == n {
				return at + 1, n, nil
			}
		}
		end -= k
	}
	return 0, lines + 1, nil
}

// next gets the next matching record into head.
func (s *stream) next(ctx context.Context) (bool, error) {
	for n := 0; ; n++ {
		if n%1024 == 1023 && ctx.Err() != nil {
			return false, nil
		}
		if s.cur == nil {
			if len(s.rot) > 0 {
				r := s.rot[0]
				s.rot = s.rot[1:]
				f, err := s.openRotated(r)
				if err != nil {
					return false, err
				}
				if f != nil && !s.q.Since.IsZero() {
					f.seekTime(s.q.Since)
				}
				s.cur = f
				continue
			}
			s.cur = s.log
		}
		if s.cur == nil {
			if !s.q.Follow {
				return false, nil
			}
			if _, ok := inode(s.path); !ok {
				return false, nil
			}
			if err := s.open(s.own - 1); err != nil {
				return false, err
			}
			if s.log == nil && len(s.rot) == 0 {
				return false, nil
			}
			continue
		}
		rec, hit, ok, err := s.record(s.cur)
		if err != nil {
			err = fmt.Errorf("cannot read log %s: %w", s.path, err)
			if s.cur == s.log {
				s.close()
			} else {
				s.cur.close()
				s.cur = nil
			}
			return false, err
		}
		if ok {
			if !hit {
				continue
			}
			if s.cur.skip > 0 {
				s.cur.skip--
				continue
			}
			s.head = rec
			if rec.Time.After(s.key) {
				s.key = rec.Time
			}
			return true, nil
		}
		if s.cur != s.log {
			s.cur.close()
			s.cur = nil
			continue
		}
		if !s.q.Follow {
			return false, nil
		}
		if again, err := s.atEnd(); !again || err != nil {
			return false, err
		}
	}
}

// atEnd looks at what happened to the log that is followed; again says that
// there may be more to read.
func (s *stream) atEnd() (again bool, err error) {
	f := s.log
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return false, err
	}
	switch have := f.off + int64(len(f.buf)-f.r); {
	case st.Size < f.off: // emptied
		f.seek(0)
		f.idx.close()
		f.idx = openIndex(s.state(".idx"), f.ino, true)
		return st.Size > 0, nil
	case st.Size < have: // the unfinished line was moved on by a rotation
		f.seek(f.off)
	case st.Size > have:
		f.mtime = time.Unix(st.Mtim.Unix())
		if f.idx == nil { // the log was opened before it had one
			f.idx = openIndex(s.state(".idx"), f.ino, true)
		}
		return true, nil
	}
	ino, ok := inode(s.path)
	if ok && ino == f.ino {
		if len(f.buf) == f.r {
			f.buf, f.r = nil, 0 // nothing to hold while nothing happens
		}
		return false, nil
	}
	if !ok && st.Nlink > 0 {
		return false, nil // in the midst of a rotation
	}
	if !f.final {
		f.final = true
		return true, nil
	}
	after := s.own
	if list, err := s.list(); err == nil {
		for _, r := range list {
			if i, ok := inode(s.file(r)); ok && i == f.ino {
				after = r.seq
			}
		}
	}
	s.close()
	s.own = after + 1
	if !ok {
		return false, nil
	}
	return true, s.open(after)
}

// record reads a line of f. hit says that the query wants it.
func (s *stream) record(f *lineFile) (rec Record, hit, ok bool, err error) {
	line, off, cut, ok, err := f.line()
	if !ok || err != nil {
		return rec, false, false, err
	}
	rec.Cut = cut
	rec.Source = s.sources[0]
	known := false
	if f.idx != nil {
		rec.Time, known = f.idx.at(off)
	}
	if !known {
		rec.Time = f.mtime
	}
	if s.form.JSON {
		hit = s.fromJSON(line, &rec)
	} else {
		s.fromText(line, &rec)
		hit = true
	}
	hit = hit && (s.q.Since.IsZero() || !rec.Time.Before(s.q.Since)) &&
		(s.q.Until.IsZero() || !rec.Time.After(s.q.Until)) &&
		(s.q.Grep == nil || s.q.Grep.MatchString(rec.Text))
	return rec, hit, true, nil
}

func (s *stream) fromText(line []byte, rec *Record) {
	if rest, ok := bytes.CutSuffix(line, []byte(cutMark)); ok {
		line, rec.Cut = rest, true
	}
	rec.Text = text(line)
	if s.form.TimeFormat == "" {
		return
	}
	for at := 0; at < len(rec.Text) && at < 128; {
		i := strings.Index(rec.Text[at:min(len(rec.Text), 130)], ": ")
		if i < 0 {
			return
		}
		if t, err := time.ParseInLocation(s.form.TimeFormat, rec.Text[:at+i], time.Local); err == nil {
			rec.Text = rec.Text[at+i+2:]
			if t.Year() > 0 { // else a layout without a date
				rec.Time = t
			}
			return
		}
		at += i + 2
	}
}

// fromJSON says whether the line is of one of the sources.
func (s *stream) fromJSON(line []byte, rec *Record) bool {
	var v struct {
		Time   time.Time `json:"time"`
		App    *string   `json:"app"`
		ID     int       `json:"id"`
		Stream string    `json:"stream"`
		Text   string    `json:"text"`
		Cut    bool      `json:"cut"`
	}
	if json.Unmarshal(line, &v) != nil || v.App == nil {
		s.fromText(line, rec) // from before the log was JSON
		return true
	}
	rec.Time, rec.Text, rec.Cut = v.Time, v.Text, v.Cut
	rec.Source = Source{App: *v.App, ID: v.ID, Stream: v.Stream}
	for _, x := range s.sources {
		if x == rec.Source {
			return true
		}
	}
	return false
}

// lineFile reads lines from a file.
type lineFile struct {
	fd    int
	ino   uint64
	mtime time.Time
	idx   *indexReader
	kind  string
	dec   io.Reader // unpacks; nil: a plain file
	free  func()
	size  int // of the first buffer
	limit int
	buf   []byte
	r     int   // buf[r:] is not yet given out
	off   int64 // offset of buf[r] in the unpacked file
	final bool  // a line without newline at the end counts
	skip  int   // matching lines to pass over
}

func (f *lineFile) close() {
	if f == nil || f.fd < 0 {
		return
	}
	f.idx.close()
	if f.free != nil {
		f.free()
	}
	_ = unix.Close(f.fd)
	f.fd, f.buf = -1, nil
}

// fdReader reads from an offset of its own.
type fdReader struct {
	fd  int
	off int64
}

func (r *fdReader) Read(b []byte) (int, error) {
	for {
		n, err := unix.Pread(r.fd, b, r.off)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, err
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		}
		r.off += int64(n)
		return n, nil
	}
}

func (f *lineFile) unpack(kind string) error {
	f.kind = kind
	if f.free != nil {
		f.free()
		f.free = nil
	}
	in := &fdReader{fd: f.fd}
	if kind == ".gz" {
		z, err := gzip.NewReader(in)
		f.dec = z
		return err
	}
	z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return err
	}
	f.dec, f.free = z, z.Close
	return nil
}

// seek sets a plain file to off.
func (f *lineFile) seek(off int64) {
	f.buf, f.r, f.off = f.buf[:0], 0, off
	if f.idx != nil {
		f.idx.restart()
	}
}

// rewind sets any file to off, at or before where it is.
func (f *lineFile) rewind(off int64) error {
	f.seek(off)
	if f.dec == nil {
		return nil
	}
	f.off = 0
	return f.unpack(f.kind)
}

// seekTime passes over lines that the index knows to be older.
func (f *lineFile) seekTime(t time.Time) {
	if f == nil || f.idx == nil || f.dec != nil {
		return
	}
	// The record there can be in the middle of a line that began earlier.
	at := f.idx.before(t)
	off, ok, err := lastNewline(f.fd, at)
	f.idx.restart()
	if err == nil && ok {
		f.off = off
	}
}

// line returns the next line and its offset. The bytes are good until the next
// call. ok is false at the (present) end of the file.
func (f *lineFile) line() (line []byte, off int64, cut, ok bool, err error) {
	for {
		line, n, cut := nextLine(f.buf[f.r:], f.limit)
		if n > 0 {
			off = f.off
			f.r += n
			f.off += int64(n)
			return line, off, cut, true, nil
		}
		if f.r > 0 {
			f.buf = f.buf[:copy(f.buf, f.buf[f.r:])]
			f.r = 0
		}
		if f.buf == nil {
			f.buf = make([]byte, 0, f.size)
		}
		if len(f.buf) == cap(f.buf) {
			f.buf = append(make([]byte, 0, min(2*cap(f.buf), f.limit+f.size)), f.buf...)
		}
		var k int
		room := f.buf[len(f.buf):cap(f.buf)]
		if f.dec != nil {
			k, err = f.dec.Read(room)
		} else {
			in := fdReader{fd: f.fd, off: f.off + int64(len(f.buf))}
			k, err = in.Read(room)
		}
		f.buf = f.buf[:len(f.buf)+k]
		if k > 0 {
			continue
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, io.EOF) {
			return nil, 0, false, false, err
		}
		if f.final && len(f.buf) > 0 {
			line, off = f.buf, f.off
			f.r, f.off = len(f.buf), f.off+int64(len(f.buf))
			return line, off, true, true, nil
		}
		return nil, 0, false, false, nil
	}
}
