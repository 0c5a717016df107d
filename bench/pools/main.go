// Command pools measures package pool beside other process pools, all in one
// run and in turns: the same small task, the same number of workers, and where
// the peer is Node's the same Node worker. It installs tinypool and workerpool
// into bench/out.
package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/remuda-dev/remuda/test/harness"
)

//go:embed programs
var programs embed.FS

func main() {
	if mode := os.Getenv(modeVar); mode != "" {
		if err := beWorker(mode); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(run())
}

// bench is one run with its settings.
type bench struct {
	dir     string // of the programs
	self    string // this program, as a worker in Go
	workers int
	rounds  int
	length  time.Duration // of one measurement
	only    string
	missed  int
}

func run() int {
	b := &bench{}
	flag.IntVar(&b.workers, "workers", 2, "workers of each pool")
	flag.IntVar(&b.rounds, "rounds", 5, "times that everything is measured, in turns")
	flag.DurationVar(&b.length, "length", 1500*time.Millisecond, "of one measurement")
	flag.StringVar(&b.only, "only", "", "only the `parts` named: peers, shared, scale (comma separated)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.main(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	fmt.Printf("\n%d bounds missed\n", b.missed)
	return 0
}

func (b *bench) main(ctx context.Context) (err error) {
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	if err := b.install(ctx); err != nil {
		return err
	}
	b.heading(ctx)
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{{"peers", b.peers}, {"shared", b.shared}, {"scale", b.scale}} {
		if b.only != "" && !strings.Contains(","+b.only+",", ","+part.name+",") {
			continue
		}
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

const manifest = `{"private": true, "dependencies": {"tinypool": "2.2.0", "workerpool": "10.0.3"}}`

// install puts the programs and what they need into a folder that is kept.
func (b *bench) install(ctx context.Context) error {
	b.dir = filepath.Join(harness.Root(), "bench", "out", "pools")
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return err
	}
	files, err := programs.ReadDir("programs")
	if err != nil {
		return err
	}
	for _, f := range files {
		text, err := programs.ReadFile("programs/" + f.Name())
		if err == nil {
			err = os.WriteFile(filepath.Join(b.dir, f.Name()), text, 0o644)
		}
		if err != nil {
			return err
		}
	}
	have, err := os.ReadFile(filepath.Join(b.dir, "package.json"))
	if _, serr := os.Stat(filepath.Join(b.dir, "node_modules", "workerpool")); err == nil && serr == nil && string(have) == manifest {
		return nil
	}
	fmt.Fprintln(os.Stderr, "  installing tinypool and workerpool")
	if err := os.WriteFile(filepath.Join(b.dir, "package.json"), []byte(manifest), 0o644); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "npm", "install", "--no-audit", "--no-fund", "--no-package-lock")
	cmd.Dir = b.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("npm install: %w\n%s", err, out)
	}
	return nil
}

func (b *bench) heading(ctx context.Context) {
	first := func(name string, args ...string) string {
		out, err := exec.CommandContext(ctx, name, args...).Output()
		if err != nil {
			return "?"
		}
		return strings.TrimSpace(string(out))
	}
	fmt.Printf("node %s, %s, kernel %s, %s cores, %d workers, %s\n", first("node", "--version"), first("python3", "--version"),
		first("uname", "-r"), first("nproc"), b.workers, time.Now().Format("2006-01-02 15:04"))
}

// figure is what one measurement came to.
type figure struct {
	Rate float64 `json:"rate"` // tasks a second
	P50  float64 `json:"p50"`  // microseconds from asked to answered; 0: not measured
}

// foreign measures a pool that is not ours.
func (b *bench) foreign(argv ...string) measure {
	return func(ctx context.Context, concurrency int) (figure, error) {
		args := slices.Concat(argv[1:], []string{strconv.Itoa(b.workers), strconv.Itoa(concurrency), strconv.Itoa(int(b.length.Milliseconds()))})
		cmd := exec.CommandContext(ctx, argv[0], args...)
		cmd.Dir = b.dir
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		var f figure
		if err == nil {
			err = json.Unmarshal(out, &f)
		}
		if err == nil && f.Rate <= 0 {
			err = errors.New("it did nothing")
		}
		if err != nil {
			return f, fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
		}
		return f, nil
	}
}

func number(v float64) string {
	switch {
	case v >= 10000:
		return strconv.FormatFloat(v/1000, 'f', 1, 64) + " k"
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// verdict compares a ratio with what it has to be.
func (b *bench) verdict(ok bool) string {
	if ok {
		return "PASS"
	}
	b.missed++
	return "MISS"
}
