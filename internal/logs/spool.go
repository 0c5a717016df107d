package logs

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"

	"golang.org/x/sys/unix"
)

// The checkpoint of a log whose lines are rewritten:
//
//	head  64 bytes: magic, crc, inode and length of the log, and the spool
//	      (slot, pipe) whose position moved last, with that position
//	slots 16 bytes each: pipe, position; pipe 0: free
//
// A batch of lines is committed by one write of the head; the slot is brought
// up to date after that, and again at load, before the next head is written.
// Head and slots are each written by one pwrite within a page, which a kill
// cannot split.
const (
	ckptMagic = 0x314b4d52 // "RMK1"
	ckptHead  = 64
	ckptSlot  = 16
	ckptMax   = 1 << 16 // slots
	noSlot    = ^uint32(0)
	// spoolHead is the length of a spool's head, which names its source.
	spoolHead = 4096
	// How much read data may lie in a spool that is empty, and in another.
	spoolRewind = 64 << 10
	spoolPunch  = 256 << 10
)

type slot struct {
	pipe uint64 // inode of the pipe; 0: free
	pos  int64  // what is before it in the spool is in the log
}

type ckptState struct {
	ino   uint64 // of the log
	size  int64  // of the log
	slots []slot
}

func encodeHead(ino uint64, size int64, at uint32, s slot) []byte {
	b := make([]byte, ckptHead)
	binary.LittleEndian.PutUint32(b, ckptMagic)
	binary.LittleEndian.PutUint64(b[8:], ino)
	binary.LittleEndian.PutUint64(b[16:], uint64(size))
	binary.LittleEndian.PutUint32(b[24:], at)
	binary.LittleEndian.PutUint64(b[32:], s.pipe)
	binary.LittleEndian.PutUint64(b[40:], uint64(s.pos))
	binary.LittleEndian.PutUint32(b[4:], crc32.ChecksumIEEE(b[8:]))
	return b
}

func encodeSlot(s slot) []byte {
	b := make([]byte, ckptSlot)
	binary.LittleEndian.PutUint64(b, s.pipe)
	binary.LittleEndian.PutUint64(b[8:], uint64(s.pos))
	return b
}

var errCheckpoint = errors.New("damaged checkpoint")

func decodeCkpt(b []byte) (ckptState, error) {
	var c ckptState
	if len(b) < ckptHead || binary.LittleEndian.Uint32(b) != ckptMagic || binary.LittleEndian.Uint32(b[4:]) != crc32.ChecksumIEEE(b[8:ckptHead]) {
		return c, errCheckpoint
	}
	c.ino = binary.LittleEndian.Uint64(b[8:])
	c.size = int64(binary.LittleEndian.Uint64(b[16:]))
	at := binary.LittleEndian.Uint32(b[24:])
	moved := slot{binary.LittleEndian.Uint64(b[32:]), int64(binary.LittleEndian.Uint64(b[40:]))}
	if c.size < 0 {
		return c, errCheckpoint
	}
	for b = b[ckptHead:]; len(b) >= ckptSlot && len(c.slots) < ckptMax; b = b[ckptSlot:] {
		s := slot{binary.LittleEndian.Uint64(b), int64(binary.LittleEndian.Uint64(b[8:]))}
		if s.pipe != 0 && s.pos < spoolHead {
			return c, errCheckpoint
		}
		c.slots = append(c.slots, s)
	}
	if at != noSlot && int64(at) < int64(len(c.slots)) && moved.pipe != 0 && c.slots[at].pipe == moved.pipe {
		if moved.pos < spoolHead {
			return c, errCheckpoint
		}
		c.slots[at].pos = moved.pos
	}
	return c, nil
}

// ckpt is the checkpoint of a sink that rewrites.
type ckpt struct {
	fd    int // -1: closed
	slots []slot
	ino   uint64 // of the log, as last recorded
	size  int64
}

func (k *ckpt) close() {
	if k != nil && k.fd >= 0 {
		_ = unix.Close(k.fd)
		k.fd = -1
	}
}

// commit records that slot at has come to pos with the log being size long.
func (s *sink) commit(at int, pos, size int64) error {
	moved, n := slot{}, noSlot
	if at >= 0 {
		moved, n = slot{s.ck.slots[at].pipe, pos}, uint32(at)
	}
	if err := pwriteFull(s.ck.fd, encodeHead(s.ino, size, n, moved), 0); err != nil {
		return err
	}
	s.size, s.ck.size, s.ck.ino = size, size, s.ino
	if at >= 0 {
		s.ck.slots[at].pos = pos
		return s.putSlot(at)
	}
	return nil
}

func (s *sink) putSlot(at int) error {
	return pwriteFull(s.ck.fd, encodeSlot(s.ck.slots[at]), ckptHead+int64(at)*ckptSlot)
}

// openCkpt loads the checkpoint of the open log, cutting the log back to it,
// or makes one. make false only loads.
func (s *sink) openCkpt(create bool) error {
	if s.ck != nil && s.ck.fd >= 0 {
		return nil
	}
	path := s.state(".ckpt")
	if s.ck != nil {
		// Closed when idle: we are still its only owner.
		fd, err := openFile(path, unix.O_RDWR)
		if err == nil {
			s.ck.fd = fd
			if s.ino == s.ck.ino && s.size > s.ck.size {
				if err := unix.Ftruncate(s.fd, s.ck.size); err != nil {
					s.ck.close()
					return err
				}
				s.size = s.ck.size
			}
			return s.commit(-1, 0, s.size)
		}
		if !errors.Is(err, unix.ENOENT) {
			return err
		}
		// Somebody removed it under our feet; begin anew.
		s.ck = nil
		for _, c := range s.caps {
			c.dropSpool()
		}
	}
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		st, derr := decodeCkpt(b)
		if derr != nil {
			// Nothing can be said about what is in the spools. Whole lines
			// twice would be worse than some lost.
			if err := os.Remove(path); err != nil {
				return err
			}
			if !create {
				return nil
			}
			break
		}
		if st.ino == s.ino && s.size > st.size {
			if err := unix.Ftruncate(s.fd, st.size); err != nil {
				return err
			}
			s.size = st.size
		}
		fd, err := openFile(path, unix.O_RDWR)
		if err != nil {
			return err
		}
		s.ck = &ckpt{fd: fd, slots: st.slots}
		for i := range st.slots {
			if err := s.putSlot(i); err != nil {
				s.ck.close()
				s.ck = nil
				return err
			}
		}
		return s.commit(-1, 0, s.size)
	case !errors.Is(err, os.ErrNotExist):
		return err
	case !create:
		return nil
	}
	return s.newCkpt(nil)
}

// newCkpt puts a new checkpoint in place, in one step.
func (s *sink) newCkpt(slots []slot) error {
	b := encodeHead(s.ino, s.size, noSlot, slot{})
	for _, x := range slots {
		b = append(b, encodeSlot(x)...)
	}
	if err := writeState(s.state(".ckpt"), b); err != nil {
		return err
	}
	fd, err := openFile(s.state(".ckpt"), unix.O_RDWR)
	if err != nil {
		return err
	}
	s.ck = &ckpt{fd: fd, slots: slots, ino: s.ino, size: s.size}
	return nil
}

func (s *sink) spoolPath(pipe uint64) string { return s.state(fmt.Sprintf(".%d.spool", pipe)) }

// spool is where the bytes of one pipe wait for the end of their line.
type spool struct {
	fd   int
	slot int
	size int64
	// punched is how far the space was given back since it was opened.
	punched int64
}

func encodeSpoolHead(src Source) []byte {
	b, err := json.Marshal(src)
	if err != nil || len(b) > spoolHead {
		b = nil // a name of 4 KiB: the lines of an orphan will be nobody's
	}
	return append(b, make([]byte, spoolHead-len(b))...)
}

func decodeSpoolHead(b []byte) Source {
	for i, c := range b {
		if c == 0 {
			b = b[:i]
			break
		}
	}
	var src Source
	if json.Unmarshal(b, &src) != nil {
		return Source{}
	}
	return src
}

func (s *sink) slotOf(pipe uint64) int {
	for i, x := range s.ck.slots {
		if x.pipe == pipe {
			return i
		}
	}
	return -1
}

func (s *sink) takeSlot(x slot) (int, error) {
	at := s.slotOf(0)
	if at < 0 {
		if len(s.ck.slots) >= ckptMax {
			return 0, fmt.Errorf("more than %d sources write into %s", ckptMax, s.path)
		}
		at = len(s.ck.slots)
		s.ck.slots = append(s.ck.slots, slot{})
	}
	old := s.ck.slots[at]
	s.ck.slots[at] = x
	if err := s.putSlot(at); err != nil {
		s.ck.slots[at] = old
		return 0, err
	}
	return at, nil
}

// freeSlot forgets a spool whose bytes are all in the log.
func (s *sink) freeSlot(at int) error {
	pipe := s.ck.slots[at].pipe
	// First the head, or a later owner of the slot could inherit a position.
	if err := s.commit(-1, 0, s.size); err != nil {
		return err
	}
	s.ck.slots[at] = slot{}
	if err := s.putSlot(at); err != nil {
		s.ck.slots[at].pipe = pipe
		return err
	}
	_ = os.Remove(s.spoolPath(pipe))
	return nil
}

// openSpool opens or makes the spool of c.
func (s *sink) openSpool(c *Capture) error {
	if c.sp != nil && c.sp.fd >= 0 {
		return nil
	}
	at := s.slotOf(c.pipeIno)
	if at >= 0 && !c.adopted && c.sp == nil {
		// The kernel has given the number of a pipe of long ago again.
		if err := s.endOrphan(at); err != nil {
			return err
		}
		at = -1
	}
	path := s.spoolPath(c.pipeIno)
	flags := unix.O_RDWR | unix.O_CREAT
	if at < 0 {
		flags |= unix.O_TRUNC
	}
	fd, err := openFile(path, flags)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return err
	}
	if st.Size < spoolHead {
		if err := pwriteFull(fd, encodeSpoolHead(c.src), 0); err != nil {
			_ = unix.Close(fd)
			return err
		}
		st.Size = spoolHead
	}
	if at < 0 {
		if at, err = s.takeSlot(slot{c.pipeIno, spoolHead}); err != nil {
			_ = unix.Close(fd)
			return err
		}
	}
	if s.ck.slots[at].pos > st.Size {
		// Killed between emptying the spool and saying so.
		if err := s.commit(at, st.Size, s.size); err != nil {
			_ = unix.Close(fd)
			return err
		}
	}
	c.sp = &spool{fd: fd, slot: at, size: st.Size}
	return nil
}

func (c *Capture) closeSpool() {
	if c.sp != nil && c.sp.fd >= 0 {
		_ = unix.Close(c.sp.fd)
		c.sp.fd = -1
	}
}

func (c *Capture) dropSpool() {
	c.closeSpool()
	c.sp = nil
}

// trimSpool gives back the space of what was read.
func (s *sink) trimSpool(sp *spool) error {
	pos := s.ck.slots[sp.slot].pos
	if pos == sp.size && pos >= spoolHead+spoolRewind {
		// First the file, then the position: a position behind the end is
		// understood, one before data already written would repeat it.
		if err := unix.Ftruncate(sp.fd, spoolHead); err != nil {
			return err
		}
		sp.size, sp.punched = spoolHead, spoolHead
		return s.commit(sp.slot, spoolHead, s.size)
	}
	from := max(spoolHead, sp.punched)
	if to := pos &^ 4095; to-from >= spoolPunch {
		// Where holes are unknown the space comes back at the next emptying.
		_ = unix.Fallocate(sp.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
		sp.punched = to
	}
	return nil
}

// endOrphan writes what a spool without an owner still holds, as of an ended
// run.
func (s *sink) endOrphan(at int) error {
	pipe := s.ck.slots[at].pipe
	fd, err := openFile(s.spoolPath(pipe), unix.O_RDWR)
	if errors.Is(err, unix.ENOENT) {
		return s.freeSlot(at)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	head := make([]byte, spoolHead)
	if _, err := preadFull(fd, head, 0); err != nil {
		return s.freeSlot(at) // shorter than its head: empty
	}
	ghost := &Capture{s: s, src: decodeSpoolHead(head), sp: &spool{fd: fd, slot: at, size: st.Size}}
	if s.ck.slots[at].pos < st.Size {
		if err := s.transform(ghost, true); err != nil {
			return err
		}
	}
	return s.freeSlot(at)
}

// endOrphans does so for all spools without an owner.
func (s *sink) endOrphans() error {
	for at, x := range s.ck.slots {
		if x.pipe == 0 {
			continue
		}
		owned := false
		for _, c := range s.caps {
			owned = owned || c.pipeIno == x.pipe
		}
		if !owned {
			if err := s.endOrphan(at); err != nil {
				return err
			}
		}
	}
	return nil
}
