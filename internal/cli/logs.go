package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
)

// patience is how long the daemon may take to answer what it answers at once.
const patience = 5 * time.Second

// Timing of reconnection: how long to wait between tries, and how long to go
// on trying.
const (
	retryFirst = 50 * time.Millisecond
	retryMost  = time.Second
	retryLimit = 60 * time.Second
)

// overlap is how far back a reconnected follower asks again: times of lines
// are true to about 100 ms, so the exact place is found by comparing lines.
const (
	overlap = time.Second
	slack   = 150 * time.Millisecond // how far two readings of a line's time may differ
)

type logFlags struct {
	lines                 int
	out, err, raw         bool
	timestamp             string
	withFormat            bool
	since, until, grep    string
	highlight             string
	follow, nostream      bool
	linesGiven, timeGiven bool
}

func (c *cli) logsCommand() *cobra.Command {
	var o logFlags
	cmd := &cobra.Command{
		Use:     "logs [TARGET…]",
		Aliases: []string{"log"},
		GroupID: groupLook,
		Short:   "Show and follow the output of apps",
		Long: `Show the last lines of apps and go on with what they write, until interrupted
(--nostream: only what there is). Rotated files are read too. Where the daemon is
restarted meanwhile, it goes on where it was.`,
		Example: `  remuda logs
  remuda logs web --lines 100 --err
  remuda logs --nostream --since 1h --grep 'timeout|refused'
  remuda logs web --json | jq -r .text`,
		Args:              takes(0, -1),
		ValidArgsFunction: c.completeTargets,
	}
	f := cmd.Flags()
	f.IntVar(&o.lines, "lines", 15, "begin with the last `n` lines of each file; -1 for all")
	f.BoolVar(&o.out, "out", false, "standard output only")
	f.BoolVar(&o.err, "err", false, "error output only")
	f.BoolVar(&o.raw, "raw", false, "the lines alone, without the app before them")
	f.StringVar(&o.timestamp, "timestamp", "", "put the time before each line, in this `format`")
	f.Lookup("timestamp").NoOptDefVal = "YYYY-MM-DDTHH:mm:ss"
	f.BoolVar(&o.withFormat, "format", false, "print key=value pairs")
	f.StringVar(&o.since, "since", "", "lines from this `time` on: 10m, 15:04, 2006-01-02 15:04:05, RFC 3339")
	f.StringVar(&o.until, "until", "", "lines up to this `time`")
	f.StringVar(&o.grep, "grep", "", "only lines that match this regular `expression` (RE2)")
	f.StringVar(&o.highlight, "highlight", "", "mark this `text`")
	f.BoolVarP(&o.follow, "follow", "f", false, "go on with what is written (that is the default)")
	f.BoolVar(&o.nostream, "nostream", false, "end with the last line there is")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		o.linesGiven, o.timeGiven = f.Changed("lines"), f.Changed("timestamp")
		return c.logs(ctx, args, o)
	})
	return cmd
}

func (c *cli) logs(ctx context.Context, targets []string, o logFlags) error {
	if o.follow && o.nostream {
		return usage("", "--follow and --nostream exclude each other")
	}
	if _, err := regexp.Compile(o.grep); err != nil {
		return usage("", "--grep: %v", err)
	}
	now := time.Now()
	q := client.LogQuery{Targets: targets, Lines: o.lines, Out: o.out, Err: o.err, Grep: o.grep}
	var err error
	if q.Since, err = moment(o.since, now); err != nil {
		return usage("", "--since %s", err)
	}
	if q.Until, err = moment(o.until, now); err != nil {
		return usage("", "--until %s", err)
	}
	if !q.Since.IsZero() && !o.linesGiven {
		q.Lines = -1
	}
	// Nothing is written before now any more.
	q.Follow = !o.nostream && (q.Until.IsZero() || q.Until.After(now))
	list, err := c.client.List(ctx, targets...)
	if err != nil {
		return err
	}
	w := &logWriter{c: c, o: o, p: c.paint(c.Stdout), out: bufio.NewWriterSize(c.Stdout, 32<<10)}
	if o.timeGiven {
		w.layout = goLayout(o.timestamp)
	}
	known := map[int]bool{}
	for _, i := range list {
		w.widen(i.ID, i.App)
		known[i.ID] = true
	}
	c.following.Store(q.Follow)
	return c.follow(ctx, w, q, known)
}

// follow copies lines to w, over restarts of the daemon. Where further
// instances than the known ones come to match, it asks anew.
func (c *cli) follow(ctx context.Context, w *logWriter, q client.LogQuery, known map[int]bool) error {
	var (
		seen     resume
		began    = time.Now()
		more     bool // it is only asked anew
		lost     time.Time
		waitNext = retryFirst
	)
	if q.Lines == 0 {
		seen.since = began.Add(-slack)
	}
	for {
		query := q
		if !seen.last.IsZero() {
			query.Since, query.Lines = seen.last.Add(-overlap), -1
		} else if (more || !lost.IsZero()) && query.Since.IsZero() && query.Lines >= 0 {
			query.Since, query.Lines = began, -1
		}
		seen.reconnected()
		stream, cancel := context.WithCancelCause(ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			if q.Follow && c.newcomer(stream, q.Targets, known, began) {
				cancel(errNewcomer)
			}
		}()
		err := drain(stream, c.client.Logs(stream, query), func(l client.LogLine) error {
			lost, waitNext = time.Time{}, retryFirst
			for _, fresh := range seen.pass(l) {
				if err := w.line(fresh); err != nil {
					return err
				}
			}
			return nil
		}, w.out.Flush)
		cancel(nil)
		<-watched
		more = errors.Is(context.Cause(stream), errNewcomer)
		var refused *client.Error
		var output *outputError
		switch {
		case more && ctx.Err() == nil && !errors.As(err, &output):
			continue
		case ctx.Err() != nil && !c.timedOut(ctx):
			return nil // ctrl-C is how one leaves a follower
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &output):
			return output.err
		case !q.Follow:
			return err
		case errors.As(err, &refused) && refused.Status/100 != 5:
			return err
		}
		// The daemon went, in good order or not: wait for the next.
		if lost.IsZero() {
			lost = time.Now()
			c.say("the daemon went away; waiting for it")
		}
		if time.Since(lost) > retryLimit {
			return fmt.Errorf("%w: gave up after %s", client.ErrUnreachable, retryLimit)
		}
		select {
		case <-ctx.Done():
		case <-time.After(waitNext):
		}
		waitNext = min(2*waitNext, retryMost)
	}
}

// errNewcomer ends a stream of logs that has to be asked for anew.
var errNewcomer = errors.New("there is another instance")

// newcomer waits until targets match an instance that is not among the known
// ones, and adds it to them; it returns false where ctx or the daemon ends
// before.
func (c *cli) newcomer(ctx context.Context, targets []client.Target, known map[int]bool, since time.Time) bool {
	for e, err := range c.client.Events(ctx, 0, true) {
		if err != nil {
			return false
		}
		if e.App == "" || e.ID < 0 || known[e.ID] || e.Time.Before(since) {
			continue
		}
		known[e.ID] = true
		list, err := c.client.List(ctx, targets...)
		if err != nil {
			continue
		}
		found := false
		for _, i := range list {
			found = found || i.ID == e.ID || !known[i.ID]
			known[i.ID] = true
		}
		if found {
			return true
		}
	}
	return false
}

func (c *cli) timedOut(ctx context.Context) bool {
	return errors.Is(ctx.Err(), context.DeadlineExceeded)
}

// outputError is a failure to write what was read.
type outputError struct{ err error }

func (e *outputError) Error() string { return e.err.Error() }

// drain hands each item of a stream to write, and flushes where no further one
// has come yet.
func drain[T any](ctx context.Context, items iter.Seq2[T, error], write func(T) error, flush func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type item struct {
		value T
		err   error
	}
	ch := make(chan item, 256)
	go func() {
		defer close(ch)
		for v, err := range items {
			select {
			case ch <- item{v, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		var it item
		var ok bool
		select {
		case it, ok = <-ch:
		default:
			if err := flush(); err != nil {
				return &outputError{err}
			}
			select {
			case it, ok = <-ch:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if !ok || it.err != nil {
			if err := flush(); err != nil {
				return &outputError{err}
			}
			return it.err
		}
		if err := write(it.value); err != nil {
			return &outputError{err}
		}
	}
}

// logWriter prints lines of logs.
type logWriter struct {
	c      *cli
	o      logFlags
	p      paint
	out    *bufio.Writer
	layout string // of times before lines, "" for none
	pad    int    // width of the widest "id|name"
}

func (w *logWriter) widen(id int, app string) string {
	s := fmt.Sprintf("%d|%s", id, fit(label(app), 32))
	w.pad = max(w.pad, width(s))
	return s
}

func (w *logWriter) line(l client.LogLine) error {
	if w.c.json {
		b, err := json.Marshal(l)
		if err != nil {
			return err
		}
		_, err = w.out.Write(append(b, '\n'))
		return err
	}
	text := l.Text
	if w.c.isTerminal(w.c.Stdout) {
		text = tame(text)
	}
	text = mark(text, w.o.highlight, w.p)
	when := ""
	if w.layout != "" {
		when = l.Time.Local().Format(w.layout)
	}
	var err error
	switch {
	case w.o.withFormat:
		_, err = fmt.Fprintf(w.out, "timestamp=%s app=%s id=%d type=%s message=%s\n", l.Time.Local().Format(time.RFC3339Nano), label(l.App), l.ID, label(l.Stream), text)
	case w.o.raw:
		if when != "" {
			when += ": "
		}
		_, err = fmt.Fprintf(w.out, "%s%s\n", when, text)
	default:
		prefix := w.widen(l.ID, l.App)
		prefix += strings.Repeat(" ", w.pad-width(prefix))
		if l.Stream == "err" {
			prefix = w.p.red(prefix)
		} else {
			prefix = w.p.app(l.App, prefix)
		}
		if when != "" {
			when += ": "
		}
		_, err = fmt.Fprintf(w.out, "%s | %s%s\n", prefix, when, text)
	}
	return err
}

// tame takes from a line what would do harm on a terminal: everything but text,
// tabs and colours. Programs colour their output, so escape sequences that end
// in m stay.
func tame(s string) string {
	s = strings.TrimSuffix(s, "\r")
	if !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 }) {
		return s
	}
	var b strings.Builder
	coloured := false
	for i := 0; i < len(s); {
		if s[i] == 0x1b && i+1 < len(s) && s[i+1] == '[' {
			end := i + 2
			for end < len(s) && (s[end] >= '0' && s[end] <= '9' || s[end] == ';' || s[end] == ':') {
				end++
			}
			if end < len(s) && s[end] == 'm' {
				b.WriteString(s[i : end+1])
				coloured = true
				i = end + 1
				continue
			}
		}
		next := i + 1
		for next < len(s) && s[next] != 0x1b {
			next++
		}
		b.WriteString(escape(s[i:next], true))
		i = next
	}
	if coloured {
		b.WriteString("\x1b[0m")
	}
	return b.String()
}

// mark shows text in s in reverse where there are colours.
func mark(s, text string, p paint) string {
	if text == "" || !p {
		return s
	}
	return strings.ReplaceAll(s, text, p.sgr("7", text))
}

// moment reads a time as a person gives it: how long ago, a time of today, a
// date, or RFC 3339. "" is the zero time.
func moment(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := ago(s); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	for _, layout := range []string{"15:04:05", "15:04"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			y, m, d := now.Local().Date()
			return time.Date(y, m, d, t.Hour(), t.Minute(), t.Second(), 0, time.Local), nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is no time: give how long ago (10m, 2h, 3d), 15:04, 2006-01-02, \"2006-01-02 15:04:05\" or RFC 3339", clip(s))
}

func ago(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n float64
		if _, err := fmt.Sscanf(days, "%g", &n); err == nil && n >= 0 && n < 36500 && isNumber(strings.Replace(days, ".", "", 1)) {
			return time.Duration(n * float64(24*time.Hour)), nil
		}
	}
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		d = -d
	}
	return d, err
}

// goLayout turns a format in moment.js's letters, which PM2 uses, into Go's;
// what has none of them is taken for one of Go's.
func goLayout(format string) string {
	if !strings.Contains(format, "YY") && !strings.Contains(format, "HH") && !strings.Contains(format, "mm") {
		return format
	}
	return strings.NewReplacer("YYYY", "2006", "YY", "06", "MMM", "Jan", "MM", "01", "DD", "02", "HH", "15", "hh", "03", "mm", "04",
		"SSS", "000", "ss", "05", "ZZ", "-0700", "Z", "-07:00", "A", "PM", "a", "pm", "ddd", "Mon").Replace(format)
}

func (c *cli) eventsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "events",
		GroupID: groupLook,
		Short:   "Show what has happened, and what happens",
		Long:    "Show the changes of state that the daemon remembers: starts, exits, restarts,\ntrouble. -f goes on with new ones.",
		Example: `  remuda events
  remuda events -f --app web
  remuda events -f --json | jq -r 'select(.type == "app.errored") | .app'`,
		Args: takes(0, 0),
	}
	follow := cmd.Flags().BoolP("follow", "f", false, "go on with what happens")
	apps := cmd.Flags().StringArray("app", nil, "only those of this `target`")
	_ = cmd.RegisterFlagCompletionFunc("app", c.completeTargets)
	cmd.RunE = c.run(needClient, func(ctx context.Context, _ []string) error {
		return c.events(ctx, *apps, *follow)
	})
	return cmd
}

func (c *cli) events(ctx context.Context, targets []string, follow bool) error {
	out := bufio.NewWriterSize(c.Stdout, 32<<10)
	p := c.paint(c.Stdout)
	var (
		after    uint64
		lost     time.Time
		waitNext = retryFirst
		answered bool
	)
	c.following.Store(follow)
	for {
		err := drain(ctx, c.client.Events(ctx, after, follow, targets...), func(e client.Event) error {
			lost, waitNext, answered = time.Time{}, retryFirst, true
			after = max(after, e.Seq)
			return c.event(out, e, p)
		}, out.Flush)
		var refused *client.Error
		var output *outputError
		switch {
		case ctx.Err() != nil && !c.timedOut(ctx):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &output):
			return output.err
		case !follow, errors.As(err, &refused) && refused.Status/100 != 5:
			return err
		case !answered && errors.Is(err, client.ErrUnreachable) && lost.IsZero():
			return err
		}
		if lost.IsZero() {
			lost = time.Now()
			c.say("the daemon went away; waiting for it")
		}
		if time.Since(lost) > retryLimit {
			return fmt.Errorf("%w: gave up after %s", client.ErrUnreachable, retryLimit)
		}
		select {
		case <-ctx.Done():
		case <-time.After(waitNext):
		}
		waitNext = min(2*waitNext, retryMost)
	}
}

func (c *cli) event(w io.Writer, e client.Event, p paint) error {
	if c.json {
		b, err := json.Marshal(e)
		if err != nil {
			return err
		}
		_, err = w.Write(append(b, '\n'))
		return err
	}
	who := ""
	if e.App != "" {
		who = label(e.App)
		if e.ID >= 0 {
			who += fmt.Sprintf(" (id %d)", e.ID)
		}
		who = p.app(e.App, who) + " "
	}
	_, err := fmt.Fprintf(w, "%s %-16s %s%s\n", p.dim(stamp(e.Time)), label(e.Type), who, oneLine(e.Text))
	return err
}
