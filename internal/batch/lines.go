package batch

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
)

// maxTask bounds a task in bytes.
const maxTask = 64 << 20

// errLong says that a task is longer than maxTask.
var errLong = fmt.Errorf("it is longer than %d bytes", maxTask)

// readTask returns the next piece up to delim, of its own memory and without
// it. A piece that the input's end cuts short comes with [io.EOF].
func readTask(in *bufio.Reader, delim byte) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice(delim)
		if len(line)+len(part) > maxTask+1 {
			return nil, errLong
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return line, err
		}
	}
}

// Count counts the tasks of an input from offset on. Blank ones are none; where
// delim is not a newline, only empty ones.
func Count(ctx context.Context, in io.ReaderAt, offset int64, delim byte) (int64, error) {
	buf := make([]byte, 256<<10)
	n, blank := int64(0), true
	for ctx.Err() == nil {
		got, err := in.ReadAt(buf, offset)
		offset += int64(got)
		for b := buf[:got]; len(b) > 0; {
			i := bytes.IndexByte(b, delim)
			piece := b
			if i >= 0 {
				piece, b = b[:i], b[i+1:]
			} else {
				b = nil
			}
			if blank && len(piece) > 0 {
				blank = isBlank(piece, delim)
			}
			if i >= 0 {
				if !blank {
					n++
				}
				blank = true
			}
		}
		if err != nil {
			if !blank {
				n++
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return n, err
		}
	}
	return n, ctx.Err()
}

// isBlank reports whether a line is no task.
func isBlank(b []byte, delim byte) bool {
	if delim != '\n' {
		return len(b) == 0
	}
	return len(bytes.TrimSpace(b)) == 0
}

// Tasks calls f for each task of an input, with its number from 1.
func Tasks(in *bufio.Reader, delim byte, f func(seq int64, task []byte) error) error {
	for seq := int64(0); ; {
		line, err := readTask(in, delim)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("cannot read task %d: %w", seq+1, err)
		}
		if !isBlank(line, delim) {
			seq++
			if err := f(seq, line); err != nil {
				return err
			}
		}
		if err != nil {
			return nil
		}
	}
}
