package logs

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// TestReadAgainstNaive compares Read with a reader that has everything in
// memory.
func TestReadAgainstNaive(t *testing.T) {
	base, err := os.MkdirTemp("/dev/shm", "logs") // thousands of small files
	if err != nil {
		base = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	nr := 0
	start := time.Unix(1_800_000_000, 0)
	rapid.Check(t, func(rt *rapid.T) {
		nr++
		dir := filepath.Join(base, fmt.Sprint(nr))
		if err := os.MkdirAll(filepath.Join(dir, stateDir), 0o700); err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(dir)
		files := rapid.IntRange(1, 3).Draw(rt, "files")
		want := make([][]Record, files)
		q := Query{}
		for f := range files {
			src := Source{"app", f, Out}
			n := namesOf(filepath.Join(dir, fmt.Sprintf("f%d.log", f)))
			q.Files = append(q.Files, QueryFile{Source: src, Path: filepath.Join(dir, n.base)})
			parts := rapid.IntRange(1, 4).Draw(rt, "parts")
			now := start
			for p := range parts {
				path, idx := n.rotated(int64(p+1)), n.rotatedIndex(int64(p+1))
				if p == parts-1 {
					path, idx = filepath.Join(dir, n.base), n.state(".idx")
				}
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					rt.Fatal(err)
				}
				ino, _ := inode(path)
				w := indexWriter{fd: -1}
				w.open(idx, ino, 0)
				var b bytes.Buffer
				lines := rapid.IntRange(0, 30).Draw(rt, "lines")
				for i := range lines {
					if i == 0 || rapid.Bool().Draw(rt, "step") {
						now = now.Add(time.Duration(rapid.IntRange(100, 5000).Draw(rt, "ms")) * time.Millisecond)
						w.mark(int64(b.Len()), now, false)
					}
					text := fmt.Sprintf("%d.%d.%d", f, p, i) + strings.Repeat("-", rapid.SampledFrom([]int{0, 1, 50, 5000}).Draw(rt, "len"))
					b.WriteString(text + "\n")
					want[f] = append(want[f], Record{Time: now, Source: src, Text: text})
				}
				w.close()
				if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
					rt.Fatal(err)
				}
				if err := os.Chtimes(path, now, now); err != nil {
					rt.Fatal(err)
				}
				if p < parts-1 {
					if how := rapid.SampledFrom([]string{CompressNone, CompressGzip, CompressZstd}).Draw(rt, "how"); how != CompressNone {
						if err := (packJob{n, rotatedFile{seq: int64(p + 1)}, how}).run(nil); err != nil {
							rt.Fatal(err)
						}
					}
				}
			}
		}
		q.Lines = rapid.SampledFrom([]int{-1, 0, 1, 7, 40, 1000}).Draw(rt, "last")
		at := func(name string) time.Time {
			if !rapid.Bool().Draw(rt, name) {
				return time.Time{}
			}
			return start.Add(time.Duration(rapid.IntRange(0, 120_000).Draw(rt, name+"-ms")) * time.Millisecond)
		}
		q.Since, q.Until = at("since"), at("until")
		if rapid.Bool().Draw(rt, "grep") {
			q.Grep = regexp.MustCompile(`[05]\b`)
		}
		var naive []Record
		for _, rs := range want {
			var hits []Record
			for _, r := range rs {
				if (q.Since.IsZero() || !r.Time.Before(q.Since)) && (q.Until.IsZero() || !r.Time.After(q.Until)) &&
					(q.Grep == nil || q.Grep.MatchString(r.Text)) {
					hits = append(hits, r)
				}
			}
			if q.Lines >= 0 {
				hits = hits[max(0, len(hits)-q.Lines):]
			}
			naive = append(naive, hits...)
		}
		slices.SortStableFunc(naive, func(a, b Record) int { return a.Time.Compare(b.Time) })
		var got []Record
		for r, err := range Read(context.Background(), q) {
			if err != nil {
				rt.Fatal(err)
			}
			got = append(got, r)
		}
		if !slices.EqualFunc(got, naive, func(a, b Record) bool {
			return a.Time.Equal(b.Time) && a.Source == b.Source && a.Text == b.Text && a.Cut == b.Cut
		}) {
			rt.Fatalf("query %+v:\n got %v\nwant %v", q, brief(got), brief(naive))
		}
	})
}

func brief(rs []Record) []string {
	var out []string
	for _, r := range rs {
		out = append(out, fmt.Sprintf("%s@%d", strings.TrimRight(r.Text, "-"), r.Time.UnixMilli()))
	}
	return out
}

// FuzzRead: any bytes as log, rotated file and index.
func FuzzRead(f *testing.F) {
	head := make([]byte, indexHead)
	head[0], head[1], head[2], head[3] = 'R', 'M', 'X', '1'
	f.Add([]byte("a\nb\n{\"app\":\"x\"}\nc"), []byte("old\n"), append(head, make([]byte, 32)...), uint8(0))
	f.Add([]byte("2026-01-02T03:04:05Z: a\n"), []byte{0x1f, 0x8b, 8, 0}, []byte{}, uint8(7))
	f.Add([]byte("\xff\n\n"), []byte{0x28, 0xb5, 0x2f, 0xfd, 0}, []byte("RMX1"), uint8(15))
	f.Fuzz(func(t *testing.T, log, rot, idx []byte, how uint8) {
		dir := t.TempDir()
		n := namesOf(filepath.Join(dir, "x.log"))
		path := filepath.Join(dir, "x.log")
		if err := os.Mkdir(filepath.Join(dir, stateDir), 0o700); err != nil {
			t.Fatal(err)
		}
		put := func(p string, b []byte) {
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		put(path, log)
		put(n.rotated(1)+[]string{"", ".gz", ".zst", ""}[how&3], rot)
		if ino, ok := inode(path); ok && len(idx) >= indexHead {
			idx = slices.Clone(idx)
			for i := range 8 {
				idx[8+i] = byte(ino >> (8 * i))
			}
		}
		put(n.state(".idx"), idx)
		put(n.rotatedIndex(1), idx)
		q := Query{Files: []QueryFile{{Source: Source{"x", 0, Out}, Path: path, JSON: how&4 != 0}}, Lines: -1}
		if how&8 != 0 {
			q.Lines, q.Since = 3, time.UnixMicro(int64(len(log)))
			q.Files[0].TimeFormat = time.RFC3339
		}
		count, limit := 0, 16<<20 // a small packed file may become large
		for r, err := range Read(context.Background(), q) {
			_ = err // damage may be told
			if len(r.Text) > 3*jsonLimit {
				t.Fatalf("a line of %d bytes", len(r.Text))
			}
			if count++; count > limit {
				break
			}
		}
	})
}

// FuzzState: any bytes as what a killed writer left.
func FuzzState(f *testing.F) {
	good := append(encodeHead(1, 2, 0, slot{3, spoolHead + 2}), encodeSlot(slot{3, spoolHead})...)
	f.Add(good, append(encodeSpoolHead(Source{"a", 1, Out}), "line\nx"...), cutJournal{1, 2, 3, 4}.encode(), []byte("log\n"))
	f.Add([]byte{}, []byte{}, []byte{}, []byte("x"))
	f.Fuzz(func(t *testing.T, ck, sp, cut, log []byte) {
		if c, err := decodeCkpt(ck); err == nil {
			for _, s := range c.slots {
				if s.pipe != 0 && s.pos < spoolHead {
					t.Fatalf("slot %+v", s)
				}
			}
		}
		decodeSpoolHead(sp)
		dir := t.TempDir()
		path := filepath.Join(dir, "x.log")
		n := namesOf(path)
		if err := os.Mkdir(filepath.Join(dir, stateDir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, log, 0o600); err != nil {
			t.Fatal(err)
		}
		// Damage that the checksums do not show.
		ino, _ := inode(path)
		if ck = slices.Clone(ck); len(ck) >= ckptHead {
			binary.LittleEndian.PutUint32(ck, ckptMagic)
			if ck[63]&1 == 0 {
				binary.LittleEndian.PutUint64(ck[8:], ino)
			}
			binary.LittleEndian.PutUint32(ck[4:], crc32.ChecksumIEEE(ck[8:ckptHead]))
		}
		if cut = slices.Clone(cut); len(cut) == 40 {
			binary.LittleEndian.PutUint32(cut, cutMagic)
			if cut[39]&1 == 0 {
				binary.LittleEndian.PutUint64(cut[32:], ino)
			}
			binary.LittleEndian.PutUint32(cut[4:], crc32.ChecksumIEEE(cut[8:]))
		}
		for p, b := range map[string][]byte{n.state(".ckpt"): ck, n.state(".3.spool"): sp, n.state(".cut"): cut} {
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		m, err := New(Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := m.Close(context.Background()); err != nil {
				t.Error(err)
			}
		}()
		m.Settle()
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		w := os.NewFile(uintptr(p[1]), "w")
		c, err := m.Attach(Source{"app", 0, Out}, os.NewFile(uintptr(p[0]), "r"), Target{Path: path, Shared: true}, true)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString("last\n"); err != nil {
			t.Fatal(err)
		}
		w.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := c.Finish(ctx); err != nil {
			t.Fatalf("damaged state keeps the log from being written: %v", err)
		}
		if b, err := os.ReadFile(path); err != nil || !bytes.HasSuffix(b, []byte("last\n")) {
			t.Fatalf("log ends %q, %v", b, err)
		}
	})
}
