package logs

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"
)

// The index of a log file: a header (magic, version, inode of the log) and
// records of 16 bytes (offset, time). A line that begins at offset o was read
// at the time of the last record whose offset is ≤ o. A record is written
// before the bytes it speaks of, so a kill leaves at most a record too many.
const (
	indexMagic  = 0x31584d52 // "RMX1"
	indexHead   = 16
	indexRecord = 16
	indexRun    = uint64(1) << 63 // flag in the time: a run begins here
	// indexStep is the least distance of two records in time. It doubles each
	// indexDouble records, so that a file that is never rotated cannot have an
	// index that grows as fast as itself.
	indexStep   = 100 * time.Millisecond
	indexDouble = 32768
)

type indexRec struct {
	off  int64
	time int64 // µs since 1970
	run  bool
}

func (r indexRec) put(b []byte) {
	binary.LittleEndian.PutUint64(b, uint64(r.off))
	t := uint64(r.time) &^ indexRun
	if r.run {
		t |= indexRun
	}
	binary.LittleEndian.PutUint64(b[8:], t)
}

func getIndexRec(b []byte) indexRec {
	t := binary.LittleEndian.Uint64(b[8:])
	return indexRec{off: int64(binary.LittleEndian.Uint64(b)), time: int64(t &^ indexRun), run: t&indexRun != 0}
}

// indexWriter appends to the index of one open log. A failure switches it off
// until the log is opened again: an index is a convenience.
type indexWriter struct {
	fd   int // -1: none
	n    int64
	last indexRec
}

func (x *indexWriter) open(path string, ino uint64, size int64) {
	x.close()
	fd, err := openFile(path, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return
	}
	x.fd, x.n, x.last = fd, 0, indexRec{}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		x.close()
		return
	}
	var b [indexHead]byte
	if n, _ := preadFull(fd, b[:], 0); n == indexHead &&
		binary.LittleEndian.Uint32(b[:]) == indexMagic &&
		binary.LittleEndian.Uint64(b[8:]) == ino {
		x.n = (st.Size - indexHead) / indexRecord
		if x.n == 0 {
			return
		}
		var r [indexRecord]byte
		if n, _ := preadFull(fd, r[:], indexHead+(x.n-1)*indexRecord); n == indexRecord {
			if x.last = getIndexRec(r[:]); x.last.off >= 0 && x.last.off <= size {
				return
			}
		}
	}
	x.reset(ino)
}

// reset empties the index.
func (x *indexWriter) reset(ino uint64) {
	if x.fd < 0 {
		return
	}
	x.n, x.last = 0, indexRec{}
	var b [indexHead]byte
	binary.LittleEndian.PutUint32(b[:], indexMagic)
	binary.LittleEndian.PutUint64(b[8:], ino)
	if unix.Ftruncate(x.fd, 0) != nil || pwriteFull(x.fd, b[:], 0) != nil {
		x.close()
	}
}

func (x *indexWriter) mark(off int64, now time.Time, run bool) {
	if x.fd < 0 {
		return
	}
	r := indexRec{off: off, time: now.UnixMicro(), run: run}
	if x.n > 0 {
		step := indexStep << min(x.n/indexDouble, 16)
		if !run && r.time-x.last.time < step.Microseconds() && r.time >= x.last.time {
			return
		}
		r.time = max(r.time, x.last.time)
		if r.off < x.last.off {
			return
		}
	}
	var b [indexRecord]byte
	r.put(b[:])
	if pwriteFull(x.fd, b[:], indexHead+x.n*indexRecord) != nil {
		x.close()
		return
	}
	x.n++
	x.last = r
}

// lastRun finds the offset at which the newest run in the file began, looking
// at no more than the last 64 Ki records.
func (x *indexWriter) lastRun() int64 {
	var b [4096]byte
	for end, looked := x.n, 0; end > 0 && looked < 256; looked++ {
		k := min(end, int64(len(b)/indexRecord))
		if n, _ := preadFull(x.fd, b[:k*indexRecord], indexHead+(end-k)*indexRecord); n < int(k*indexRecord) {
			break
		}
		for i := k - 1; i >= 0; i-- {
			if r := getIndexRec(b[i*indexRecord:]); r.run {
				return r.off
			}
		}
		end -= k
	}
	return 0
}

func (x *indexWriter) close() {
	if x.fd >= 0 {
		_ = unix.Close(x.fd)
	}
	x.fd = -1
}

// indexReader answers for offsets in rising order. Damage ends the index early.
type indexReader struct {
	fd     int
	active bool // the file may grow
	n      int64
	i      int64 // number of the record next is
	cur    indexRec
	next   indexRec
	has    bool // cur is valid
	more   bool // next is valid
	buf    []byte
	bufAt  int64 // number of the first record in buf
}

// openIndex returns nil where there is no index that fits. ino 0 accepts any.
func openIndex(path string, ino uint64, active bool) *indexReader {
	fd, err := openFile(path, unix.O_RDONLY)
	if err != nil {
		return nil
	}
	var b [indexHead]byte
	if n, _ := preadFull(fd, b[:], 0); n < indexHead || binary.LittleEndian.Uint32(b[:]) != indexMagic ||
		ino != 0 && binary.LittleEndian.Uint64(b[8:]) != ino {
		_ = unix.Close(fd)
		return nil
	}
	x := &indexReader{fd: fd, active: active}
	x.refresh()
	x.load()
	return x
}

func (x *indexReader) refresh() {
	var st unix.Stat_t
	if unix.Fstat(x.fd, &st) == nil && st.Size >= indexHead {
		x.n = (st.Size - indexHead) / indexRecord
	}
}

func (x *indexReader) rec(i int64) (indexRec, bool) {
	if i < 0 || i >= x.n {
		return indexRec{}, false
	}
	if i < x.bufAt || i >= x.bufAt+int64(len(x.buf)/indexRecord) {
		if x.buf == nil {
			x.buf = make([]byte, 0, 16*indexRecord)
		}
		n, _ := preadFull(x.fd, x.buf[:cap(x.buf)], indexHead+i*indexRecord)
		x.buf, x.bufAt = x.buf[:n/indexRecord*indexRecord], i
		if len(x.buf) == 0 {
			return indexRec{}, false
		}
	}
	return getIndexRec(x.buf[(i-x.bufAt)*indexRecord:]), true
}

func (x *indexReader) load() {
	r, ok := x.rec(x.i)
	x.next, x.more = r, ok && r.off >= 0 && (!x.has || r.off >= x.cur.off && r.time >= x.cur.time)
}

// at returns the time of the line that begins at off.
func (x *indexReader) at(off int64) (time.Time, bool) {
	if !x.more && x.active {
		x.refresh()
		x.buf = x.buf[:0]
		x.load()
	}
	for x.more && x.next.off <= off {
		x.cur, x.has = x.next, true
		x.i++
		if x.i == x.n && x.active {
			x.refresh()
		}
		x.load()
	}
	return time.UnixMicro(x.cur.time), x.has
}

// before returns the offset before which every line is older than t, and sets
// the reader there. It trusts the order of the records only as far as the
// search goes; a damaged index costs lines that are looked at in vain at worst,
// since the result is verified against the two records around it.
func (x *indexReader) before(t time.Time) int64 {
	x.refresh()
	us := t.UnixMicro()
	lo, hi := int64(0), x.n // records < lo are older
	for lo < hi {
		mid := lo + (hi-lo)/2
		r, ok := x.rec(mid)
		if !ok {
			return 0
		}
		if r.time < us {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return 0
	}
	r, ok := x.rec(lo - 1)
	if !ok || r.off < 0 {
		return 0
	}
	x.i, x.has = lo-1, false
	x.load()
	// Lines from r.off on to the next record have r's time, which is too old,
	// but only a look at the log tells where the last of them ends.
	return r.off
}

func (x *indexReader) close() {
	if x != nil && x.fd >= 0 {
		_ = unix.Close(x.fd)
		x.fd = -1
	}
}

// restart makes the reader answer for any offset again.
func (x *indexReader) restart() {
	x.i, x.has, x.cur = 0, false, indexRec{}
	x.load()
}
