// Command campaign kills the daemon again and again while programs run under
// it, and proves that they do not notice.
//
// Every round the controller is killed with SIGKILL at a random moment: while
// nothing happens, while it is starting from the kill before, or while a
// start, stop, restart, reload or delete is being carried out. Then it is upgraded
// under load, then the keeper is killed, then both at once. All the while a
// watchman looks at /proc for a program that runs twice. At the end processes
// and logs are held against what they have to be.
//
// It exits with 1 where anything was violated, and prints figures. -seed
// repeats the choices of an earlier run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/test/harness"
)

func main() {
	os.Exit(run())
}

func run() int {
	rounds := flag.Int("rounds", 200, "rounds of killing the controller")
	short := flag.Bool("short", false, "25 rounds, for CI")
	seed := flag.Uint64("seed", 0, "seed of all choices (0: a new one)")
	bin := flag.String("bin", "", "the program (default: build it)")
	keep := flag.Bool("keep", false, "keep the folder when something was violated")
	limit := flag.Duration("within", 500*time.Millisecond, "supervision has to be back in this time")
	flag.Parse()
	if *short {
		*rounds = 25
	}
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute+time.Duration(*rounds)*3*time.Second)
	defer cancel()

	fmt.Printf("crash campaign: %d rounds, -seed %d\n", *rounds, *seed)
	c := &campaign{
		rng: rand.New(rand.NewPCG(*seed, 1)), rounds: *rounds, limit: *limit,
		steady: map[string]int{}, wrong: map[string]int{},
	}
	if err := c.prepare(ctx, *bin); err != nil {
		fmt.Fprintln(os.Stderr, "campaign: cannot begin:", err)
		return 1
	}
	err := c.all(ctx)
	if err != nil {
		c.violate("the campaign broke off: %v", err)
	}
	return c.end(*keep)
}

// campaign is one run. Its methods are called from one goroutine; the
// watchman has its own and shares only what mu guards.
type campaign struct {
	rng    *rand.Rand
	rounds int
	limit  time.Duration
	home   *harness.Home
	client *client.Client
	mark   string
	second string // a copy of the program to upgrade to

	steady   map[string]int // app → pid that must never change
	children map[int]uint64 // the forker's descendants: pid → start

	back      []time.Duration // kill → list complete
	backFirst []time.Duration // kill → first answer
	upgraded  []time.Duration
	kinds     map[string]int
	tally     []string

	mu     sync.Mutex
	wrong  map[string]int // violation → times
	scans  int
	refuse map[string]bool // apps that must not run at all
}

func (c *campaign) violate(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	msg := fmt.Sprintf(format, args...)
	if c.wrong[msg]++; c.wrong[msg] == 1 {
		fmt.Println("VIOLATION:", msg)
	}
}

func (c *campaign) prepare(ctx context.Context, bin string) error {
	tmp, err := os.MkdirTemp("", "rmdbin")
	if err != nil {
		return err
	}
	if bin == "" {
		bin, err = harness.Build(ctx, tmp, false)
	} else {
		bin, err = filepath.Abs(bin)
	}
	if err != nil {
		return err
	}
	if c.home, err = harness.New(bin, nil); err != nil {
		return err
	}
	c.client = c.home.Client()
	c.mark = filepath.Base(c.home.Dir)
	b, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	c.second = filepath.Join(c.home.Dir, "remuda-next")
	if err := os.WriteFile(c.second, b, 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(tmp); bin != filepath.Join(tmp, "remuda") {
		return err
	}
	// The program that was built lives on as a file in the home.
	c.home.Bin = filepath.Join(c.home.Dir, "remuda")
	return os.WriteFile(c.home.Bin, b, 0o755)
}

func (c *campaign) all(ctx context.Context) error {
	apps, err := c.apps()
	if err != nil {
		return err
	}
	if r, err := c.home.Must(ctx, "start", filepath.Join(c.home.Dir, "sleep.json")); err != nil {
		return fmt.Errorf("first start: %w %v", err, r)
	}
	res, err := c.client.Start(ctx, client.StartRequest{Apps: apps})
	if err != nil {
		return err
	}
	for _, o := range res.Instances {
		if o.Error != "" {
			return fmt.Errorf("%s does not start: %s", o.App, o.Error)
		}
	}
	if _, err := c.client.Act(ctx, client.ActRequest{Verb: client.VerbStop, Targets: []string{"never"}}); err != nil {
		return err
	}
	if err := c.tellPID(ctx); err != nil {
		return err
	}
	list, err := c.client.List(ctx)
	if err != nil {
		return err
	}
	for _, i := range list {
		if isSteady(i.App) {
			c.steady[i.App] = i.PID
		}
	}
	if err := c.rememberChildren(ctx); err != nil {
		return err
	}
	c.refuse = map[string]bool{"never": true}
	watching, stopWatch := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); c.watch(watching) }()
	defer func() { stopWatch(); <-done }()

	for _, phase := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"controller killed", c.crashes},
		{"upgraded under load", c.upgrades},
		{"logs", c.checkLogs},
		{"keeper killed", c.keeperKilled},
		{"keeper and controller killed", c.bothKilled},
	} {
		begin := time.Now()
		if err := phase.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", phase.name, err)
		}
		fmt.Printf("  %-30s %6.1fs\n", phase.name, time.Since(begin).Seconds())
	}
	return nil
}

// crashes is the main part: the rounds.
func (c *campaign) crashes(ctx context.Context) error {
	c.kinds = map[string]int{}
	for round := range c.rounds {
		pause(ctx, time.Duration(c.rng.IntN(150))*time.Millisecond)
		kind := []string{"plain", "plain", "while starting", "during a command"}[c.rng.IntN(4)]
		c.kinds[kind]++
		if err := c.round(ctx, kind); err != nil {
			return fmt.Errorf("round %d (%s): %w", round+1, kind, err)
		}
	}
	return c.settleExits(ctx)
}

func (c *campaign) round(ctx context.Context, kind string) error {
	info, err := c.info(ctx, 0)
	if err != nil {
		return err
	}
	inFlight := func() error { return nil }
	if kind == "during a command" {
		inFlight = c.commandInFlight(ctx)
		pause(ctx, time.Duration(c.rng.IntN(30000))*time.Microsecond)
	}
	old := info.PID
	begin := time.Now()
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		return fmt.Errorf("the controller (pid %d) is not there: %w", old, err)
	}
	if kind == "while starting" {
		for range 1 + c.rng.IntN(2) {
			pid, err := c.nextController(ctx, info.KeeperPID, old)
			if err != nil {
				return err
			}
			pause(ctx, time.Duration(c.rng.IntN(15000))*time.Microsecond)
			begin, old = time.Now(), pid
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	now, err := c.info(ctx, old)
	if err != nil {
		return err
	}
	first := time.Since(begin)
	if now.KeeperPID != info.KeeperPID {
		c.violate("the keeper changed from pid %d to %d", info.KeeperPID, now.KeeperPID)
	}
	if err := c.complete(ctx); err != nil {
		return err
	}
	all := time.Since(begin)
	c.back, c.backFirst = append(c.back, all), append(c.backFirst, first)
	if all > c.limit {
		c.violate("supervision was back after %v (%s), more than %v", all.Round(time.Millisecond), kind, c.limit)
	}
	if err := inFlight(); err != nil {
		return err
	}
	if err := c.tellPID(ctx); err != nil {
		return err
	}
	return c.once3(ctx)
}

// info waits for an answer of a controller other than not.
func (c *campaign) info(ctx context.Context, not int) (client.Info, error) {
	var last error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(time.Millisecond) {
		info, err := c.client.Info(ctx)
		if err == nil && info.PID != not {
			return info, nil
		}
		last = err
	}
	return client.Info{}, fmt.Errorf("no controller other than pid %d answers within 20 s: %w", not, errors.Join(last, ctx.Err()))
}

// complete waits until the list shows every app, the steady ones as the same
// running process.
func (c *campaign) complete(ctx context.Context) error {
	return harness.Eventually(20*time.Second, func() error {
		list, err := c.client.List(ctx)
		if err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, i := range list {
			seen[i.App] = true
			if pid := c.steady[i.App]; pid != 0 && i.PID != pid {
				if i.PID != 0 {
					c.violate("%s runs as pid %d, it was started as %d", i.App, i.PID, pid)
				}
				return fmt.Errorf("%s: pid %d in place of %d (%s %s)", i.App, i.PID, pid, i.State, i.Reason)
			}
		}
		for app := range c.steady {
			if !seen[app] {
				return fmt.Errorf("%s is not in the list", app)
			}
		}
		if !seen["never"] || !seen["exit3"] || !seen["once3"] {
			return fmt.Errorf("an app is not in the list: %v", seen)
		}
		return nil
	})
}

// nextController finds the controller that the keeper started after old,
// before it answers.
func (c *campaign) nextController(ctx context.Context, keeper, old int) (int, error) {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(500 * time.Microsecond) {
		for _, pid := range harness.Children(keeper) {
			if pid == old || c.isSteadyPID(pid) {
				continue
			}
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err == nil && strings.Contains(string(b), "\x00controller") {
				return pid, nil
			}
		}
	}
	return 0, fmt.Errorf("the keeper started no controller after pid %d within 20 s", old)
}

func (c *campaign) isSteadyPID(pid int) bool {
	for _, p := range c.steady {
		if p == pid {
			return true
		}
	}
	return false
}

// commandInFlight begins a command and returns what has to be done once the
// controller is back: the same command again must then succeed and what runs
// must be as it asked.
func (c *campaign) commandInFlight(ctx context.Context) (after func() error) {
	verb := []string{"restart", "reload", "stop", "start", "delete", "scale"}[c.rng.IntN(6)]
	c.kinds["  "+verb]++
	args := map[string][]string{
		"restart": {"restart", "busy"},
		"reload":  {"reload", "busy"},
		"stop":    {"stop", "busy"},
		"start":   {"start", filepath.Join(c.home.Dir, "busy.json")},
		"delete":  {"delete", "busy"},
		"scale":   {"scale", "busy", "3"},
	}[verb]
	short, cancel := context.WithTimeout(ctx, 30*time.Second)
	first := make(chan harness.Result, 1)
	if verb != "start" { // busy has to be there
		if r := c.home.Run(short, "start", filepath.Join(c.home.Dir, "busy.json")); r.Code != 0 {
			c.violate("starting busy: %v", r)
		}
	}
	go func() { first <- c.home.Run(short, args...) }()
	return func() error {
		defer cancel()
		r := <-first
		if r.Code == -1 {
			c.violate("remuda %s, whose daemon was killed, did not end: %v", verb, r)
		}
		if r := c.home.Run(short, args...); r.Code != 0 && (verb != "delete" || r.Code != 3) {
			c.violate("remuda %s after the kill: %v", verb, r)
		}
		want := map[string]int{"restart": 1, "reload": 1, "stop": 0, "start": 1, "delete": 0, "scale": 3}[verb]
		if err := harness.Eventually(5*time.Second, func() error {
			if n := len(c.leaders("busy")); n != want {
				return fmt.Errorf("%d processes of busy in place of %d after %s, killed, %s", n, want, verb, verb)
			}
			return nil
		}); err != nil {
			c.violate("%v", err)
		}
		if r := c.home.Run(short, "delete", "busy"); r.Code != 0 && r.Code != 3 {
			c.violate("deleting busy: %v", r)
		}
		if err := harness.Eventually(5*time.Second, func() error {
			if l := c.leaders("busy"); len(l) > 0 {
				return fmt.Errorf("busy was deleted and runs: %s", harness.Describe(l))
			}
			return nil
		}); err != nil {
			c.violate("%v", err)
		}
		return nil
	}
}

// upgrades replaces the controller by another copy of the program.
func (c *campaign) upgrades(ctx context.Context) error {
	n := max(3, c.rounds/20)
	for i := range n {
		bin := []string{c.second, c.home.Bin}[i%2]
		before, err := c.info(ctx, 0)
		if err != nil {
			return err
		}
		pause(ctx, time.Duration(c.rng.IntN(100))*time.Millisecond)
		r := c.home.Run(ctx, "upgrade", "--binary", bin)
		if r.Code != 0 {
			return fmt.Errorf("remuda upgrade: %v", r)
		}
		c.upgraded = append(c.upgraded, r.Wall)
		now, err := c.info(ctx, 0)
		if err != nil {
			return err
		}
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", now.PID))
		if now.PID == before.PID || exe != bin {
			c.violate("after upgrade to %s the controller is pid %d (before: %d) of %s", bin, now.PID, before.PID, exe)
		}
		if now.KeeperPID != before.KeeperPID {
			c.violate("upgrade changed the keeper")
		}
		if err := c.complete(ctx); err != nil {
			return err
		}
		if err := c.tellPID(ctx); err != nil {
			return err
		}
		if err := c.once3(ctx); err != nil {
			return err
		}
		if i == 0 { // a crash after an upgrade starts the new program again, not the old
			if err := syscall.Kill(now.PID, syscall.SIGKILL); err != nil {
				return err
			}
			again, err := c.info(ctx, now.PID)
			if err != nil {
				return err
			}
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", again.PID)); exe != bin {
				c.violate("the controller that crashed was %s, the next is %s", bin, exe)
			}
			if err := errors.Join(c.complete(ctx), c.tellPID(ctx), c.once3(ctx)); err != nil {
				return err
			}
		}
	}
	return c.settleExits(ctx)
}

// keeperKilled: the controller ends every run, and a new keeper starts them
// again.
func (c *campaign) keeperKilled(ctx context.Context) error {
	before, err := c.info(ctx, 0)
	if err != nil {
		return err
	}
	return c.fallen(ctx, before, func() error {
		return syscall.Kill(before.KeeperPID, syscall.SIGKILL)
	}, nil)
}

// bothKilled: everything is left without a parent; the next command's daemon
// sweeps it up before it starts anything.
func (c *campaign) bothKilled(ctx context.Context) error {
	before, err := c.info(ctx, 0)
	if err != nil {
		return err
	}
	return c.fallen(ctx, before, func() error {
		_ = syscall.Kill(before.KeeperPID, syscall.SIGSTOP)
		_ = syscall.Kill(before.PID, syscall.SIGSTOP)
		return errors.Join(syscall.Kill(before.PID, syscall.SIGKILL), syscall.Kill(before.KeeperPID, syscall.SIGKILL))
	}, func() error {
		r := c.home.Run(ctx, "start", "sleep")
		if r.Code != 0 {
			return fmt.Errorf("remuda start sleep, the first command after both were killed: %v", r)
		}
		return nil
	})
}

func (c *campaign) fallen(ctx context.Context, before client.Info, kill, next func() error) error {
	var old []harness.Proc
	for app := range c.steady {
		old = append(old, c.leaders(app)...)
	}
	begin := time.Now()
	if err := kill(); err != nil {
		return err
	}
	if next != nil {
		pause(ctx, 50*time.Millisecond)
		if err := next(); err != nil {
			return err
		}
	}
	err := harness.Eventually(30*time.Second, func() error {
		info, err := c.client.Info(ctx)
		if err != nil {
			return err
		}
		if info.KeeperPID == before.KeeperPID {
			return errors.New("the keeper that was killed is still named")
		}
		list, err := c.client.List(ctx)
		if err != nil {
			return err
		}
		online := map[string]bool{}
		for _, i := range list {
			if i.State == client.Online && i.PID != c.steady[i.App] {
				online[i.App] = true
			}
		}
		for app := range c.steady {
			if !online[app] {
				return fmt.Errorf("%s does not run again", app)
			}
		}
		return nil
	})
	if err != nil {
		c.violate("%v", err)
		return nil
	}
	c.tally = append(c.tally, fmt.Sprintf("keeper gone: everything runs again after %v", time.Since(begin).Round(time.Millisecond)))
	for _, p := range old {
		if now, ok := harness.Stat(p.PID); ok && now.Start == p.Start && now.State != 'Z' {
			c.violate("%s outlived the keeper and its successor", harness.Describe([]harness.Proc{p}))
		}
	}
	for pid, start := range c.children {
		if now, ok := harness.Stat(pid); ok && now.Start == start && now.State != 'Z' {
			c.violate("a grandchild (pid %d) outlived the keeper and its successor", pid)
		}
	}
	list, err := c.client.List(ctx)
	if err != nil {
		return err
	}
	for _, i := range list {
		if isSteady(i.App) {
			c.steady[i.App] = i.PID
		}
	}
	return errors.Join(c.tellPID(ctx), c.rememberChildren(ctx))
}

// end takes everything down and prints the account.
func (c *campaign) end(keep bool) int {
	c.client.Close()
	if keep && len(c.wrong) > 0 {
		fmt.Println("kept:", c.home.Dir)
		c.home.Destroy()
	} else {
		if len(c.wrong) > 0 {
			c.tailDaemonLog()
		}
		if err := c.home.Close(); err != nil {
			c.violate("taking down: %v", err)
		}
	}
	fmt.Println()
	fmt.Println("| figure | n | median | p99 | max |")
	fmt.Println("|---|---:|---:|---:|---:|")
	row := func(name string, v []time.Duration) {
		if len(v) == 0 {
			return
		}
		r := func(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
		fmt.Printf("| %s | %d | %v | %v | %v |\n", name, len(v), r(harness.Median(v)), r(harness.Quantile(v, 0.99)), r(slices.Max(v)))
	}
	row("kill -9 of the controller → first answer", c.backFirst)
	row("kill -9 of the controller → list complete", c.back)
	row("remuda upgrade, whole command", c.upgraded)
	fmt.Println()
	var kinds []string
	for k := range c.kinds {
		kinds = append(kinds, k)
	}
	slices.Sort(kinds)
	for _, k := range kinds {
		fmt.Printf("  %-20s %d rounds\n", strings.TrimSpace(k), c.kinds[k])
	}
	for _, t := range c.tally {
		fmt.Println(" ", t)
	}
	fmt.Printf("  %d looks at /proc for a program running twice\n", c.scans)
	fmt.Printf("%d violations\n", len(c.wrong))
	if len(c.wrong) > 0 {
		return 1
	}
	return 0
}

func (c *campaign) tailDaemonLog() {
	b, err := os.ReadFile(filepath.Join(c.home.Home, "logs", "daemon.log"))
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	fmt.Println("the daemon's last words:")
	for _, l := range lines[max(0, len(lines)-30):] {
		fmt.Println("  |", l)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
