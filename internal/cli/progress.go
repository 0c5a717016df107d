package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/remuda-dev/remuda/internal/batch"
)

const (
	barEvery   = 150 * time.Millisecond // how often the bar is drawn
	plainEvery = 10 * time.Second       // how often there is a line where there is no terminal
	lastWords  = time.Second            // what workers have written is waited for so long
	rateOver   = 15 * time.Second       // what the rate is the mean of
)

// progress shows how far a run of tasks is on standard error: a bar where that
// is a terminal, a line now and then where it is not. What else goes to the
// terminal meanwhile goes through it, by whole lines, so that neither spoils the
// other.
type progress struct {
	c     *cli
	of    *batch.Progress
	total atomic.Int64 // of tasks, 0 where it is not known
	began time.Time
	paint paint

	mpb *mpb.Progress
	bar *mpb.Bar // nil where there is none

	quit   chan struct{} // of the one who writes lines
	others sync.WaitGroup
	once   sync.Once
	outs   []*lineWriter
	worker *os.File // what workers write to
	heard  *os.File // its other end
	cancel context.CancelFunc

	mu      sync.Mutex
	samples []reading // the oldest first
}

type reading struct {
	at   time.Time
	done int64
}

func newProgress(c *cli, of *batch.Progress, wanted, terminal bool) *progress {
	p := &progress{c: c, of: of, began: time.Now(), paint: c.paint(c.Stderr)}
	switch f, _ := c.Stderr.(*os.File); {
	case !wanted:
	case terminal && f != nil && c.getenv("TERM") != "dumb":
		p.mpb = mpb.New(mpb.WithOutput(f), mpb.WithRefreshRate(barEvery), mpb.WithAutoRefresh())
		p.bar = p.mpb.New(1, filler(p.fill), mpb.BarFillerTrim())
	default:
		p.quit = make(chan struct{})
		p.others.Go(p.plain)
	}
	return p
}

// filler is a bar that draws itself.
type filler func(w io.Writer, width int) error

// Build implements [mpb.BarFillerBuilder].
func (f filler) Build() mpb.BarFiller {
	return mpb.BarFillerFunc(func(w io.Writer, s decor.Statistics) error { return f(w, s.AvailableWidth) })
}

func (p *progress) fill(w io.Writer, width int) error {
	_, err := io.WriteString(w, p.line(width))
	return err
}

// plain writes a line now and then.
func (p *progress) plain() {
	tick := time.NewTicker(plainEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.c.say("%s", p.line(0))
		case <-p.quit:
			p.c.say("%s", p.line(0))
			return
		}
	}
}

// count finds out in the background how many tasks there are.
func (p *progress) count(ctx context.Context, in *os.File, at int64, nul bool) {
	delim := byte('\n')
	if nul {
		delim = 0
	}
	ctx, p.cancel = context.WithCancel(ctx)
	p.others.Go(func() {
		// Where it fails the run will fail to read it as well.
		if n, err := batch.Count(ctx, in, at, delim); err == nil {
			p.total.Store(n)
		}
	})
}

// rate is how many tasks end in a second, over the last while.
func (p *progress) rate(now time.Time, done int64) float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.samples) == 0 {
		p.samples = append(p.samples, reading{p.began, p.of.Skipped.Load()})
	}
	if last := p.samples[len(p.samples)-1]; now.Sub(last.at) >= barEvery/2 {
		p.samples = append(p.samples, reading{now, done})
	}
	for len(p.samples) > 2 && now.Sub(p.samples[1].at) > rateOver {
		p.samples = p.samples[1:]
	}
	first := p.samples[0]
	// Those done by an earlier run pass in no time.
	from := max(first.done, p.of.Skipped.Load())
	d := now.Sub(first.at).Seconds()
	if d <= 0 || done <= from {
		return 0
	}
	return float64(done-from) / d
}

// line is how far it is, in width columns; 0: in words of any width.
func (p *progress) line(width int) string {
	now := time.Now()
	done, failed, total := p.of.Done.Load(), p.of.Failed.Load(), p.total.Load()
	running := min(p.of.Running.Load(), p.of.Slots.Load())
	rate := p.rate(now, done)
	count := fmt.Sprintf("%d done", done)
	if total > 0 && done <= total {
		count = fmt.Sprintf("%d/%d %d%%", done, total, done*100/total)
	}
	parts := []string{speed(rate)}
	switch {
	case total > 0 && done < total && rate > 0:
		parts = append(parts, span(time.Duration(float64(total-done)/rate*float64(time.Second)).Round(time.Second))+" left")
	default:
		parts = append(parts, span(now.Sub(p.began)))
	}
	if n := p.of.Skipped.Load(); n > 0 {
		parts = append(parts, fmt.Sprintf("%d before", n))
	}
	if failed > 0 {
		parts = append(parts, fmt.Sprintf("%d failed", failed))
	}
	parts = append(parts, fmt.Sprintf("%d running", running))
	if width <= 0 {
		return count + ", " + strings.Join(parts, ", ")
	}
	rest := strings.Join(parts, "  ")
	s := count
	if room := width - len(count) - len(rest) - 6; room >= 8 && total > 0 {
		room = min(room, 40)
		full := int(min(done, total) * int64(room) / total)
		s += "  [" + strings.Repeat("=", full) + strings.Repeat("-", room-full) + "]"
	}
	s = fit(s+"  "+rest, width)
	if failed > 0 {
		s = strings.Replace(s, fmt.Sprintf("%d failed", failed), p.paint.red(fmt.Sprintf("%d failed", failed)), 1)
	}
	return s
}

// speed is a rate in words.
func speed(perSecond float64) string {
	switch {
	case perSecond <= 0:
		return "-/s"
	case perSecond < 1:
		return fmt.Sprintf("%.1f/min", perSecond*60)
	case perSecond < 100:
		return fmt.Sprintf("%.1f/s", perSecond)
	}
	return fmt.Sprintf("%.0f/s", perSecond)
}

// say is [cli.say] past the bar.
func (p *progress) say(format string, args ...any) {
	if p.bar == nil {
		p.c.say(format, args...)
		return
	}
	// The writer is asked for no more than a line, which it takes as a whole.
	_, _ = p.write([]byte("remuda: " + clean(fmt.Sprintf(format, args...), maxMessage) + "\n"))
}

// write writes whole lines above the bar.
func (p *progress) write(b []byte) (int, error) {
	if n, err := p.mpb.Write(b); err == nil {
		return n, nil
	}
	return p.c.Stderr.Write(b) // the bar is gone
}

// lines is a writer of what is to be seen above the bar.
func (p *progress) lines() io.Writer {
	w := &lineWriter{p: p}
	p.outs = append(p.outs, w)
	return w
}

// pipe is a file whose lines are seen above the bar, until end; nil where it
// cannot be had.
func (p *progress) pipe() *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		return nil
	}
	p.worker, p.heard = w, r
	to := p.lines()
	p.others.Go(func() {
		defer r.Close()
		_, _ = io.Copy(to, r)
	})
	return w
}

// end draws it for the last time. What is written later goes to the terminal as
// it is.
func (p *progress) end() {
	p.once.Do(func() {
		if p.worker != nil {
			p.worker.Close()
			// The workers have ended; what got away from them may hold the pipe.
			_ = p.heard.SetReadDeadline(time.Now().Add(lastWords))
		}
		if p.cancel != nil {
			p.cancel()
		}
		if p.quit != nil {
			close(p.quit)
		}
		p.others.Wait()
		for _, w := range p.outs {
			w.flush()
		}
		if p.bar != nil {
			p.bar.Abort(false)
			p.mpb.Wait()
		}
	})
}

// lineWriter passes on whole lines.
type lineWriter struct {
	p  *progress
	mu sync.Mutex
	b  []byte
}

// maxHeldLine is how much of a line is held back.
const maxHeldLine = 64 << 10

// Write implements [io.Writer].
func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b = append(w.b, b...)
	n := bytes.LastIndexByte(w.b, '\n') + 1
	if n == 0 && len(w.b) < maxHeldLine {
		return len(b), nil
	}
	if n == 0 {
		w.b = append(w.b, '\n')
		n = len(w.b)
	}
	_, err := w.p.write(w.b[:n])
	w.b = append(w.b[:0], w.b[n:]...)
	return len(b), err
}

// flush passes on what has no newline.
func (w *lineWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.b) > 0 {
		_, _ = w.p.write(append(w.b, '\n'))
		w.b = nil
	}
}
