// Command peers measures Remuda beside PM2 and supervisord: the same programs,
// the same method, one run. It installs PM2 into bench/out; supervisord has to
// be in PATH. Every daemon has a home of its own and is gone at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/test/harness"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "write" {
		os.Exit(write(os.Args[2:]))
	}
	os.Exit(run())
}

// bench is one run with its settings.
type bench struct {
	dir   string // everything is below it
	self  string // this program, as the writer of logs
	quick bool
	runs  int
	only  string
	table table
}

func run() int {
	b := &bench{}
	flag.BoolVar(&b.quick, "quick", false, "fewer repetitions, 10 s in place of 60 s idle, 100 MB of logs")
	flag.IntVar(&b.runs, "runs", 3, "repetitions of what takes long (start, logs)")
	flag.StringVar(&b.only, "only", "", "only the `measurements` named: start, kill, list, memory, idle, logs, thousand (comma separated)")
	peers := flag.String("peers", "remuda,pm2,supervisord", "what to measure")
	bin := flag.String("bin", "", "the remuda to measure (default: build it)")
	flag.Parse()
	if b.quick {
		b.runs = 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.main(ctx, strings.Split(*peers, ","), *bin); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func (b *bench) main(ctx context.Context, names []string, bin string) (err error) {
	if b.dir, err = os.MkdirTemp("", "rmdbench"); err != nil {
		return err
	}
	defer func() {
		h := harness.Home{Dir: b.dir}
		h.Destroy()
		err = errors.Join(err, os.RemoveAll(b.dir))
	}()
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	var all []peer
	for _, n := range names {
		var p peer
		switch n {
		case "remuda":
			p, err = newRemuda(ctx, b.dir, bin)
		case "pm2":
			p, err = newPM2(ctx, b.dir)
		case "supervisord":
			p, err = newSupervisord(ctx, b.dir)
		default:
			err = fmt.Errorf("no peer is called %q", n)
		}
		if err != nil {
			return err
		}
		all = append(all, p)
	}
	b.table.peers = names
	b.heading(ctx, all)
	for _, p := range all {
		if err := b.measure(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", p.name(), errors.Join(err, p.down()))
		}
		if err := p.down(); err != nil {
			return fmt.Errorf("%s does not end: %w", p.name(), err)
		}
	}
	if b.wants("logs") {
		if err := b.logs(ctx, all); err != nil {
			return fmt.Errorf("logs: %w", err)
		}
	}
	fmt.Println()
	return b.table.print()
}

func (b *bench) wants(what string) bool {
	if b.only == "" {
		return true
	}
	for _, o := range strings.Split(b.only, ",") {
		if o == what {
			return true
		}
	}
	return false
}

func (b *bench) heading(ctx context.Context, all []peer) {
	var versions []string
	for _, p := range all {
		versions = append(versions, p.name()+" "+p.version(ctx))
	}
	kernel, _ := exec.CommandContext(ctx, "uname", "-r").Output()
	cores, _ := exec.CommandContext(ctx, "nproc").Output()
	fmt.Printf("%s; kernel %s, %s cores, %s\n", strings.Join(versions, ", "),
		strings.TrimSpace(string(kernel)), strings.TrimSpace(string(cores)), time.Now().Format("2006-01-02 15:04"))
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "  "+format+"\n", args...)
}

// repeat is how often a quick thing is measured.
func (b *bench) repeat(n int) int {
	if b.quick {
		return max(5, n/4)
	}
	return n
}

const program = "/usr/bin/sleep"

const sleepArg = "864001" // tells our programs from others

func (b *bench) measure(ctx context.Context, p peer) error {
	add := func(id string, v ...float64) { b.table.add(id, p.name(), v...) }
	say("%s: empty", p.name())
	if err := p.up(ctx); err != nil {
		return err
	}
	if b.wants("memory") {
		pause(ctx, 3*time.Second)
		rss, pss := memory(p.daemons())
		add("rss0", rss)
		add("pss0", pss)
	}
	n := 1
	if b.wants("start") {
		n = b.runs
	}
	for i := range n {
		wall, err := p.start(ctx, 100)
		if err != nil {
			return fmt.Errorf("start 100: %w", err)
		}
		if err := waitCount(ctx, p, 100); err != nil {
			return err
		}
		if b.wants("start") {
			add("start100", ms(wall))
		}
		if i < n-1 {
			if err := p.clear(ctx, 100); err != nil {
				return fmt.Errorf("delete 100: %w", err)
			}
		}
	}
	say("%s: 100 programs run", p.name())
	pause(ctx, 3*time.Second)
	if b.wants("memory") {
		rss, pss := memory(p.daemons())
		add("rss100", rss)
		add("pss100", pss)
	}
	if b.wants("list") {
		for range b.repeat(30) {
			wall, err := timed(p.command(ctx, p.listArgs()...))
			if err != nil {
				return fmt.Errorf("list: %w", err)
			}
			add("list100", ms(wall))
		}
	}
	if b.wants("kill") {
		if err := b.kill(ctx, p, add); err != nil {
			return err
		}
	}
	if b.wants("idle") {
		d := 60 * time.Second
		if b.quick {
			d = 10 * time.Second
		}
		pause(ctx, 3*time.Second)
		before := ticks(p.daemons())
		pause(ctx, d)
		add("idle", float64(ticks(p.daemons())-before)/100*float64(60*time.Second/d))
	}
	if err := p.clear(ctx, 100); err != nil {
		return fmt.Errorf("delete 100: %w", err)
	}
	if b.wants("start") && p.name() != "supervisord" {
		for range b.runs {
			wall, err := p.instances(ctx, 100)
			if err != nil {
				return fmt.Errorf("start -i 100: %w", err)
			}
			add("start-i", ms(wall))
			if err := waitCount(ctx, p, 100); err != nil {
				return err
			}
			if err := p.clear(ctx, 100); err != nil {
				return err
			}
		}
	}
	if b.wants("thousand") && p.name() == "remuda" {
		return b.thousand(ctx, p, add)
	}
	return nil
}

// kill kills programs one by one and looks for the daemon's new child.
func (b *bench) kill(ctx context.Context, p peer, add func(string, ...float64)) error {
	rounds := b.repeat(60)
	if p.name() == "supervisord" {
		rounds = b.repeat(20)
	}
	say("%s: killing %d programs", p.name(), rounds)
	victims := programs(p.parent())
	if len(victims) < rounds {
		return fmt.Errorf("%d programs run", len(victims))
	}
	// The kernel tells when the program's file is opened, which is when the new
	// process executes it: nothing is polled beside what is measured.
	started, err := watchOpens(program)
	if err != nil {
		return err
	}
	defer started.Close()
	for i := range rounds {
		known := map[int]bool{}
		for _, pid := range harness.Children(p.parent()) {
			known[pid] = true
		}
		if err := started.drain(); err != nil {
			return err
		}
		begin := time.Now()
		if err := syscall.Kill(victims[i], syscall.SIGKILL); err != nil {
			return err
		}
		if err := started.wait(30 * time.Second); err != nil {
			return fmt.Errorf("a killed program was not started again: %w", err)
		}
		wall := time.Since(begin)
		for found := false; !found; time.Sleep(time.Millisecond) {
			if time.Since(begin) > 30*time.Second || ctx.Err() != nil {
				return errors.New("a killed program was not started again within 30 s")
			}
			for _, pid := range harness.Children(p.parent()) {
				if !known[pid] && isProgram(pid) {
					found = true
				}
			}
		}
		add("kill", ms(wall))
		pause(ctx, 20*time.Millisecond)
	}
	return nil
}

func (b *bench) thousand(ctx context.Context, p peer, add func(string, ...float64)) error {
	say("%s: 1,000 programs", p.name())
	wall, err := p.start(ctx, 1000)
	if err != nil {
		return fmt.Errorf("start 1000: %w", err)
	}
	add("start1000", ms(wall))
	if err := waitCount(ctx, p, 1000); err != nil {
		return err
	}
	pause(ctx, 5*time.Second)
	rss, pss := memory(p.daemons())
	add("rss1000", rss)
	add("pss1000", pss)
	for range b.repeat(20) {
		wall, err := timed(p.command(ctx, p.listArgs()...))
		if err != nil {
			return err
		}
		add("list1000", ms(wall))
	}
	before := ticks(p.daemons())
	pause(ctx, 10*time.Second)
	add("idle1000", float64(ticks(p.daemons())-before)/100*6)
	for _, verb := range []string{"restart", "stop"} {
		wall, err := timed(p.command(ctx, verb, "all", "-s"))
		if err != nil {
			return fmt.Errorf("%s 1000: %w", verb, err)
		}
		add(verb+"1000", ms(wall))
	}
	return p.clear(ctx, 1000)
}

// logs measures 500 MB of output, each time beside the same through cat.
func (b *bench) logs(ctx context.Context, all []peer) error {
	mb := 500
	if b.quick {
		mb = 100
	}
	cats := map[string][]float64{}
	for i := range b.runs {
		for _, p := range all {
			say("logs: %d MB by cat and by %s, run %d", mb, p.name(), i+1)
			cat, err := b.cat(ctx, mb)
			if err != nil {
				return err
			}
			if err := p.up(ctx); err != nil {
				return err
			}
			wall, cpu, err := b.logRun(ctx, p, mb)
			if err := errors.Join(err, p.down()); err != nil {
				return fmt.Errorf("%s: %w", p.name(), err)
			}
			cats[p.name()] = append(cats[p.name()], cat)
			b.table.add("cat", p.name(), cat)
			b.table.add("logwall", p.name(), wall)
			b.table.add("logratio", p.name(), wall/cat)
			b.table.add("logcpu", p.name(), cpu)
		}
	}
	return nil
}

func (b *bench) cat(ctx context.Context, mb int) (float64, error) {
	out := filepath.Join(b.dir, "cat.log")
	defer os.Remove(out)
	cmd := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf("'%s' write %d - | cat >'%s'", b.self, mb, out))
	begin := time.Now()
	err := cmd.Run()
	return ms(time.Since(begin)), err
}

func (b *bench) logRun(ctx context.Context, p peer, mb int) (wall, cpu float64, err error) {
	dir, err := os.MkdirTemp(b.dir, "log")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	gate, out := filepath.Join(dir, "go"), filepath.Join(dir, "out.log")
	if err := p.startLogger(ctx, []string{b.self, "write", fmt.Sprint(mb), gate}, out); err != nil {
		return 0, 0, err
	}
	pause(ctx, time.Second)
	before := ticks(p.daemons())
	begin := time.Now()
	if err := os.WriteFile(gate, nil, 0o644); err != nil {
		return 0, 0, err
	}
	for !ended(dir) {
		if time.Since(begin) > 3*time.Minute || ctx.Err() != nil {
			return 0, 0, errors.New("the last line does not appear in the log")
		}
		time.Sleep(4 * time.Millisecond) // each look takes time from what is measured
	}
	wall = ms(time.Since(begin))
	pause(ctx, 300*time.Millisecond)
	return wall, float64(ticks(p.daemons())-before) / 100, nil
}

// ended says whether the newest part of a log ends with the writer's last
// line.
func ended(dir string) bool {
	names, _ := filepath.Glob(filepath.Join(dir, "out*"))
	for _, n := range names {
		f, err := os.Open(n)
		if err != nil {
			continue
		}
		var tail [32]byte
		st, err := f.Stat()
		if err == nil && st.Size() >= int64(len(tail)) {
			k, _ := f.ReadAt(tail[:], st.Size()-int64(len(tail)))
			if strings.Contains(string(tail[:k]), lastLine) {
				f.Close()
				return true
			}
		}
		f.Close()
	}
	return false
}
