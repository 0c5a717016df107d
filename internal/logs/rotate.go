package logs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"compress/gzip"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// Rotation of /d/x.log, cut at a line boundary (offset c), the unfinished line
// behind it going to the new file. Each step can be done again after a kill;
// the journal .cut says that there is something to do again:
//
//  1. write .remuda/x.log.next: the bytes behind c (where there are any)
//  2. write .remuda/x.log.cut: number, c, inode of x.log
//  3. rename x.log to x.log.NNNNNN, and its index likewise
//  4. truncate x.log.NNNNNN to c
//  5. rename .next to x.log (or let the next open make it)
//  6. remove .cut
//
// Nothing else is written to the log meanwhile. A follower holds the old file
// and stands at most at c, since it takes whole lines only.

const stateDir = ".remuda"

type names struct{ dir, base string }

func namesOf(path string) names {
	return names{dir: filepath.Dir(path), base: filepath.Base(path)}
}

func (n names) state(suffix string) string { return filepath.Join(n.dir, stateDir, n.base+suffix) }
func (n names) rotated(seq int64) string {
	return filepath.Join(n.dir, fmt.Sprintf("%s.%06d", n.base, seq))
}
func (n names) rotatedIndex(seq int64) string { return n.state(fmt.Sprintf(".%06d.idx", seq)) }

// rotatedFile is one rotated file of a log.
type rotatedFile struct {
	seq    int64
	suffix string // "", ".gz", ".zst"
	both   bool   // the compressed one exists too (a kill before the removal)
}

func (n names) file(r rotatedFile) string { return n.rotated(r.seq) + r.suffix }

// list returns the rotated files, oldest first.
func (n names) list() ([]rotatedFile, error) {
	d, err := os.Open(n.dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	defer d.Close()
	var out []rotatedFile
	for {
		ents, err := d.Readdirnames(512)
		for _, name := range ents {
			rest, ok := strings.CutPrefix(name, n.base+".")
			if !ok {
				continue
			}
			digits, suffix := rest, ""
			if i := strings.IndexByte(rest, '.'); i >= 0 {
				digits, suffix = rest[:i], rest[i:]
			}
			if len(digits) < 6 || len(digits) > 15 || suffix != "" && suffix != ".gz" && suffix != ".zst" {
				continue
			}
			seq, err := strconv.ParseUint(digits, 10, 62)
			if err != nil {
				continue
			}
			out = append(out, rotatedFile{seq: int64(seq), suffix: suffix})
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				break
			}
			return nil, err
		}
	}
	slices.SortFunc(out, func(a, b rotatedFile) int {
		if a.seq != b.seq {
			return int(max(-1, min(1, a.seq-b.seq)))
		}
		return strings.Compare(a.suffix, b.suffix)
	})
	// Of two forms of one file the uncompressed one comes first and stays.
	w := 0
	for _, r := range out {
		if w > 0 && out[w-1].seq == r.seq {
			out[w-1].both = true
			continue
		}
		out[w] = r
		w++
	}
	return out[:w], nil
}

// remove removes r in whatever form it has by now.
func (n names) remove(r rotatedFile) {
	for _, suffix := range []string{"", ".gz", ".zst"} {
		_ = os.Remove(n.rotated(r.seq) + suffix)
	}
	_ = os.Remove(n.rotatedIndex(r.seq))
}

// cutJournal is the contents of .cut.
type cutJournal struct {
	seq, off, tail int64
	ino            uint64
}

const cutMagic = 0x31434d52 // "RMC1"

func (j cutJournal) encode() []byte {
	b := make([]byte, 40)
	binary.LittleEndian.PutUint32(b, cutMagic)
	binary.LittleEndian.PutUint64(b[8:], uint64(j.seq))
	binary.LittleEndian.PutUint64(b[16:], uint64(j.off))
	binary.LittleEndian.PutUint64(b[24:], uint64(j.tail))
	binary.LittleEndian.PutUint64(b[32:], j.ino)
	binary.LittleEndian.PutUint32(b[4:], crc32.ChecksumIEEE(b[8:]))
	return b
}

func decodeCut(b []byte) (cutJournal, bool) {
	if len(b) != 40 || binary.LittleEndian.Uint32(b) != cutMagic || binary.LittleEndian.Uint32(b[4:]) != crc32.ChecksumIEEE(b[8:]) {
		return cutJournal{}, false
	}
	j := cutJournal{
		seq:  int64(binary.LittleEndian.Uint64(b[8:])),
		off:  int64(binary.LittleEndian.Uint64(b[16:])),
		tail: int64(binary.LittleEndian.Uint64(b[24:])),
		ino:  binary.LittleEndian.Uint64(b[32:]),
	}
	return j, j.seq > 0 && j.seq < 1e15 && j.off >= 0 && j.tail >= 0
}

// writeState writes a small file so that it is there wholly or not at all.
func writeState(path string, b []byte) error {
	tmp := path + ".tmp"
	fd, err := openFile(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	err = pwriteFull(fd, b, 0)
	_ = unix.Close(fd)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return err
}

func inode(path string) (uint64, bool) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, false
	}
	return st.Ino, true
}

// finishCut does what is left of a rotation (steps 3 to 6).
func (n names) finishCut(j cutJournal) error {
	path, old := filepath.Join(n.dir, n.base), n.rotated(j.seq)
	if ino, ok := inode(path); ok && ino == j.ino {
		if err := os.Rename(path, old); err != nil {
			return err
		}
	}
	if x := openIndex(n.state(".idx"), j.ino, false); x != nil {
		x.close()
		_ = os.Rename(n.state(".idx"), n.rotatedIndex(j.seq))
	}
	var st unix.Stat_t
	if err := unix.Lstat(old, &st); err == nil && st.Ino == j.ino && st.Size > j.off {
		if err := os.Truncate(old, j.off); err != nil {
			return err
		}
	}
	if _, ok := inode(path); !ok && j.tail > 0 {
		var st unix.Stat_t
		if err := unix.Lstat(n.state(".next"), &st); err == nil && st.Size == j.tail {
			if err := os.Rename(n.state(".next"), path); err != nil {
				return err
			}
		}
	}
	return os.Remove(n.state(".cut"))
}

// recoverCut finishes a rotation that a kill has interrupted.
func (n names) recoverCut() error {
	b, err := os.ReadFile(n.state(".cut"))
	if err != nil {
		return nil // none
	}
	j, ok := decodeCut(b)
	if !ok {
		return os.Remove(n.state(".cut"))
	}
	if err := n.finishCut(j); err != nil {
		// Where the log itself was not moved yet, giving up the rotation is
		// as good; to write on with the journal in place would not be.
		if ino, ok := inode(filepath.Join(n.dir, n.base)); ok && ino == j.ino {
			return os.Remove(n.state(".cut"))
		}
		return err
	}
	return nil
}

// rotate cuts the log at off. The log is closed afterwards, also on error.
func (s *sink) rotate(off int64) error {
	list, err := s.list()
	if err != nil {
		return err
	}
	j := cutJournal{seq: 1, off: off, tail: s.size - off, ino: s.ino}
	if len(list) > 0 {
		j.seq = list[len(list)-1].seq + 1
	}
	if err := s.copyTail(off); err != nil {
		return err
	}
	if err := writeState(s.state(".cut"), j.encode()); err != nil {
		return err
	}
	last := s.idx.last
	s.closeLog()
	s.recovered = false // the next open finishes what fails here
	if err := s.finishCut(j); err != nil {
		return err
	}
	s.recovered = true
	for _, c := range s.caps {
		if c.ino == j.ino {
			c.start, c.ino = c.start-off, 0
			if c.tap != nil {
				c.tap.off = max(0, c.tap.off-off)
			}
		}
	}
	list = append(list, rotatedFile{seq: j.seq})
	for len(list) > max(0, s.t.Keep) {
		// Not here: to give back megabytes of cache takes the kernel
		// milliseconds, during which the pipe would fill.
		s.m.later(packJob{names: s.names, file: list[0]})
		list = list[1:]
	}
	if s.t.Compress != "" && s.t.Compress != CompressNone {
		for _, r := range list {
			if r.suffix == "" {
				s.m.later(packJob{names: s.names, file: r, how: s.t.Compress})
			}
		}
	}
	if err := s.openLog(); err != nil {
		return err
	}
	for _, c := range s.caps {
		if c.ino == 0 {
			c.ino = s.ino
		}
	}
	if s.size > 0 {
		s.idx.mark(0, time.UnixMicro(last.time), false)
	}
	return nil
}

func (s *sink) copyTail(off int64) error {
	if off == s.size {
		return nil
	}
	fd, err := openFile(s.state(".next"), unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := make([]byte, min(65536, s.size-off))
	for at := off; at < s.size; {
		k := min(int64(len(b)), s.size-at)
		if _, err := preadFull(s.fd, b[:k], at); err != nil {
			return err
		}
		if err := pwriteFull(fd, b[:k], at-off); err != nil {
			_ = os.Remove(s.state(".next"))
			return err
		}
		at += k
	}
	return nil
}

// packJob is work on a rotated file: to pack it (how), or to remove it ("").
type packJob struct {
	names names
	file  rotatedFile
	how   string
}

// later has a job done by a goroutine that lives only while there are any, one
// job at a time. What is not done when the manager ends is found again at the
// next rotation.
func (m *Manager) later(job packJob) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || slices.Contains(m.jobs, job) {
		return
	}
	m.jobs = append(m.jobs, job)
	if !m.compressing {
		m.compressing = true
		m.wg.Add(1)
		go m.compressLoop()
	}
}

func (m *Manager) compressLoop() {
	defer m.wg.Done()
	for {
		m.mu.Lock()
		if len(m.jobs) == 0 || m.closed {
			m.jobs, m.compressing = nil, false
			m.mu.Unlock()
			return
		}
		// Removals first: nothing must be packed that is to go.
		i := max(0, slices.IndexFunc(m.jobs, func(j packJob) bool { return j.how == "" }))
		j := m.jobs[i]
		m.mu.Unlock()
		if j.how == "" {
			j.names.remove(j.file)
		} else {
			_ = j.run(m.stop) // where it fails the file stays as it is
		}
		m.mu.Lock()
		if i = slices.Index(m.jobs, j); i >= 0 {
			m.jobs = slices.Delete(m.jobs, i, i+1)
		}
		m.mu.Unlock()
	}
}

func (j packJob) run(stop <-chan struct{}) (err error) {
	src := j.names.rotated(j.file.seq)
	fd, err := openFile(src, unix.O_RDONLY)
	if err != nil {
		return err
	}
	in := os.NewFile(uintptr(fd), src)
	defer in.Close()
	before, err := in.Stat()
	if err != nil {
		return err
	}
	tmp := j.names.state(".pack")
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		out.Close()
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	var w io.WriteCloser
	suffix := ".gz"
	if j.how == CompressZstd {
		suffix = ".zst"
		w, err = zstd.NewWriter(out, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true),
			zstd.WithWindowSize(256<<10), zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err != nil {
			return err
		}
	} else {
		w = gzip.NewWriter(out)
	}
	buf := make([]byte, 32<<10)
	for {
		select {
		case <-stop:
			return errClosed
		default:
		}
		n, rerr := in.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(rerr, io.EOF) {
			break
		}
		if rerr != nil {
			return rerr
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := os.Chtimes(tmp, before.ModTime(), before.ModTime()); err != nil {
		return err
	}
	if _, ok := inode(src); !ok {
		return fs.ErrNotExist // removed meanwhile, by a flush or because Keep was reached
	}
	if err := os.Rename(tmp, src+suffix); err != nil {
		return err
	}
	return os.Remove(src)
}
