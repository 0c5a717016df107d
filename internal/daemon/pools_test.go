package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/pool"
	"github.com/remuda-dev/remuda/worker"
)

// workerVar makes the test binary a worker.
const workerVar = "DAEMON_TEST_WORKER"

func workerMain() error {
	return worker.Serve(context.Background(), worker.Handlers{
		"": func(_ context.Context, t *worker.Task) ([]byte, error) {
			return fmt.Appendf(nil, "%s %s %d", os.Getenv(workerVar), t.Body, os.Getpid()), nil
		},
		"echo": func(_ context.Context, t *worker.Task) ([]byte, error) { return t.Body, nil },
		"say": func(_ context.Context, t *worker.Task) ([]byte, error) {
			_, err := fmt.Println(string(t.Body))
			return nil, err
		},
		"fail": func(context.Context, *worker.Task) ([]byte, error) {
			return nil, &worker.Error{Code: "E_TEST", Message: "no such luck", Data: json.RawMessage(`{"n":1}`)}
		},
		"die": func(context.Context, *worker.Task) ([]byte, error) {
			os.Exit(3)
			return nil, nil
		},
		"hang": func(context.Context, *worker.Task) ([]byte, error) { select {} },
		// until waits until a file is there.
		"until": func(ctx context.Context, t *worker.Task) ([]byte, error) {
			if err := os.WriteFile(string(t.Body)+".began", nil, 0o600); err != nil {
				return nil, err
			}
			for {
				if _, err := os.Stat(string(t.Body)); err == nil {
					return []byte(os.Getenv(workerVar)), nil
				}
				select {
				case <-ctx.Done():
					return nil, errors.Join(ctx.Err(), os.WriteFile(string(t.Body)+".cancelled", nil, 0o600))
				case <-time.After(5 * time.Millisecond):
				}
			}
		},
	})
}

// pool is a pool of this test binary; which tells lives apart.
func (b *box) pool(name, which string) config.Pool {
	b.Helper()
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	second := config.Duration(time.Second)
	return config.Pool{
		Name: name, Namespace: "default", Command: []string{exe}, Script: exe, Interpreter: "none", Cwd: b.home,
		Env: map[string]string{workerVar: which, "GORACE": "atexit_sleep_ms=0"}, InheritEnv: true, Autostart: true,
		Logs: config.Logs{Compress: "none"}, Protocol: "frames", Min: 2, Max: 2, ScaleUpWait: second / 10, ScaleDownIdle: 30 * second,
		Cooldown: second, Concurrency: 1, Balance: "least-busy", Queue: 1024, Full: "block", Grace: 5 * second,
		StartTimeout: 20 * second, Retries: 2, PoisonAfter: 3, MaxMessage: 64 << 20, Source: "/f.yaml",
	}
}

// up makes the daemon's pools equal these.
func (b *box) up(pools ...config.Pool) client.ActResult {
	b.Helper()
	res := b.well(b.c.Up(b.ctx, client.UpRequest{Source: "/f.yaml", Pools: pools}))
	for _, o := range res.Pools {
		if o.Error != "" {
			b.Fatalf("%s: %s", o.Name, o.Error)
		}
	}
	return res
}

func (b *box) one(name string) client.PoolInfo {
	b.Helper()
	list, err := b.c.Pools(b.ctx, name)
	if err != nil || len(list) != 1 {
		b.Fatalf("%d pools are called %s: %v", len(list), name, err)
	}
	return list[0]
}

func (b *box) do(name, task, body string) (string, error) {
	r, err := b.c.Do(b.ctx, name, client.PoolTask{Name: task, Body: []byte(body)})
	return string(r.Body), err
}

// which is the life of the pool that does a task.
func (b *box) which(name string) string {
	b.Helper()
	s, err := b.do(name, "", "x")
	if err != nil {
		b.Fatal(err)
	}
	which, _, _ := strings.Cut(s, " ")
	return which
}

func kind(err error) client.TaskKind {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return ""
}

func (b *box) there(name string) func() bool {
	return func() bool {
		_, err := os.Stat(filepath.Join(b.home, name))
		return err == nil
	}
}

func (b *box) dead(pids []int) func() bool {
	return func() bool {
		return !slices.ContainsFunc(pids, func(pid int) bool { return syscall.Kill(pid, 0) == nil })
	}
}

func TestPoolDoesTasks(t *testing.T) {
	b := newBox(t)
	b.up(b.pool("p", "a"))
	if got := b.which("p"); got != "a" {
		t.Errorf("done by %q", got)
	}
	_, err := b.do("p", "fail", "")
	var e *client.Error
	if !errors.As(err, &e) || e.Kind != client.TaskFailed || e.Code != "E_TEST" || e.Detail != "no such luck" || string(e.Data) != `{"n":1}` {
		t.Errorf("%#v", err)
	}
	if _, err := b.do("p", "die", ""); kind(err) != client.TaskWorkerDied {
		t.Error(err)
	}
	if _, err := b.do("p", "", strings.Repeat("x", 64<<20+1)); kind(err) != client.TaskInvalid {
		t.Error(err)
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	if r, err := b.c.Do(b.ctx, "p", client.PoolTask{Name: "echo", Body: big}); err != nil || !bytes.Equal(r.Body, big) {
		t.Errorf("%d bytes came back: %v", len(r.Body), err)
	}
	if _, err := b.c.Do(b.ctx, "p", client.PoolTask{Name: "hang", Timeout: 50 * time.Millisecond}); kind(err) != client.TaskTimedOut {
		t.Error(err)
	}
	if _, err := b.do("pp", "", ""); !errors.Is(err, client.ErrNoTarget) || !strings.Contains(err.Error(), `did you mean "p"?`) {
		t.Error(err)
	}
	// Who hangs up gives the task up.
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan error, 1)
	go func() {
		_, err := b.c.Do(ctx, "p", client.PoolTask{Name: "until", Body: []byte(b.home + "/gone")})
		done <- err
	}()
	b.until("the task has begun", b.there("gone.began"))
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	b.until("the worker is told", b.there("gone.cancelled"))
	if _, err := b.do("p", "say", "a word of a worker"); err != nil {
		t.Error(err)
	}
	b.until("its output is in the log", func() bool { return strings.Contains(b.read("logs/p-out.log"), "a word of a worker") })
	var said []string
	for l, err := range b.c.Logs(b.ctx, client.LogQuery{Targets: []string{"p"}, Lines: 10}) {
		if err != nil {
			t.Error(err)
		}
		said = append(said, l.Text)
	}
	if !slices.Contains(said, "a word of a worker") {
		t.Errorf("logs: %q", said)
	}
	v := b.one("p")
	if v.State != client.Online || v.Stats.Done < 3 || v.Stats.Failed != 1 || v.Stats.Died == 0 || v.Stats.Verdict.Reason == "" || v.Spec != nil {
		t.Errorf("%+v", v)
	}
	specs, err := b.c.DescribePools(b.ctx, false, "all")
	if err != nil || len(specs) != 1 || specs[0].Spec == nil || specs[0].Spec.Command[0] == "" {
		t.Errorf("%+v %v", specs, err)
	}
	var types []string
	for e, err := range b.c.Events(b.ctx, 0, false, "p") {
		if err != nil {
			t.Error(err)
		}
		types = append(types, e.Type)
	}
	if !slices.Contains(types, "pool.online") || !slices.Contains(types, "pool.worker-died") {
		t.Errorf("events: %q", types)
	}
}

// What is changed by up is live where it can be; else others take over, and no
// task is lost.
func TestPoolChanges(t *testing.T) {
	b := newBox(t)
	p := b.pool("p", "a")
	b.up(p)
	before := b.one("p")
	held := make(chan error, 1)
	go func() {
		got, err := b.do("p", "until", b.home+"/go")
		if err == nil && got != "a" {
			err = fmt.Errorf("done by %q", got)
		}
		held <- err
	}()
	b.until("a task is held", b.there("go.began"))

	p.Min, p.Max = 1, 3
	if res := b.up(p); res.Changes[0].Action != "scale" || !res.Changes[0].Pool {
		t.Errorf("%+v", res.Changes)
	}
	if v := b.one("p"); v.Stats.Min != 1 || v.Stats.Max != 3 || !v.Since.Equal(before.Since) {
		t.Errorf("%+v", v)
	}
	if res := b.up(p); res.Changes[0].Action != "none" || !b.one("p").Since.Equal(before.Since) {
		t.Errorf("%+v", res.Changes)
	}

	// Tasks go on all the time while the workers are replaced.
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := b.do("p", "echo", "x"); err != nil {
					t.Errorf("a task was lost: %v", err)
					return
				}
			}
		})
	}
	p.Env = map[string]string{workerVar: "b", "GORACE": "atexit_sleep_ms=0"}
	if res := b.up(p); res.Changes[0].Action != "change" {
		t.Errorf("%+v", res.Changes)
	}
	if got := b.which("p"); got != "b" {
		t.Errorf("done by %q", got)
	}
	b.until("only the task that is held drains", func() bool { return b.one("p").Draining == 1 })
	res, err := b.c.ActPools(b.ctx, client.ActRequest{Verb: client.VerbRestart, Targets: []string{"p"}})
	b.well(res, err)
	close(stop)
	callers.Wait()
	b.write("go", "")
	if err := <-held; err != nil {
		t.Error(err)
	}
	b.until("only the present workers are left", func() bool { v := b.one("p"); return v.Draining == 0 && len(v.PIDs) <= 3 })

	// A form that does not work is not taken.
	bad := p
	bad.Command = []string{"/bin/false"}
	got, err := b.c.Up(b.ctx, client.UpRequest{Source: "/f.yaml", Pools: []config.Pool{bad}})
	if err != nil || !strings.Contains(got.Pools[0].Error, "those before go on") {
		t.Errorf("%+v %v", got, err)
	}
	if got := b.which("p"); got != "b" {
		t.Errorf("done by %q", got)
	}
	if res := b.up(p); res.Changes[0].Action != "none" {
		t.Errorf("%+v", res.Changes)
	}
	if _, err := b.c.ScalePool(b.ctx, "p", "+2"); err != nil {
		t.Error(err)
	}
	if v := b.one("p"); v.Stats.Min != 3 || v.Stats.Max != 5 {
		t.Errorf("%+v", v.Stats)
	}
	for _, to := range []string{"", "0", "-9", "x", "4..2", "1..", "9999999", "1..5000", "+"} {
		if _, err := b.c.ScalePool(b.ctx, "p", to); err == nil {
			t.Errorf("a size of %q", to)
		}
	}
	pids := b.one("p").PIDs
	b.up(b.pool("other", "c"))
	if _, err := b.c.Pools(b.ctx, "p"); !errors.Is(err, client.ErrNoTarget) {
		t.Error(err)
	}
	b.until("the workers have ended", b.dead(pids))
}

// The controller is killed over a task: its caller is told, the workers are
// cleared away, and the pool comes back.
func TestPoolOverCrash(t *testing.T) {
	b := newBox(t)
	b.up(b.pool("p", "a"))
	before := b.one("p")
	done := make(chan error, 1)
	go func() {
		_, err := b.do("p", "until", b.home+"/never")
		done <- err
	}()
	b.until("a task is held", b.there("never.began"))
	if _, err := b.do("p", "say", "last words"); err != nil {
		t.Fatal(err)
	}
	b.crash()
	if err := <-done; !errors.Is(err, client.ErrTaskLost) {
		t.Errorf("the caller is told %v", err)
	}
	if got := b.which("p"); got != "a" {
		t.Errorf("done by %q", got)
	}
	b.until("the workers before are gone", b.dead(before.PIDs))
	if v := b.one("p"); v.ID != before.ID || len(v.PIDs) != 2 {
		t.Errorf("%+v", v)
	}
	if !strings.Contains(b.read("logs/p-out.log"), "last words") {
		t.Error("output was lost")
	}
	// A pool that is stopped stays so.
	if _, err := b.c.ActPools(b.ctx, client.ActRequest{Verb: client.VerbDrain, Targets: []string{"p"}}); err != nil {
		t.Fatal(err)
	}
	b.crash()
	if v := b.one("p"); v.State != client.Stopped || len(v.PIDs) != 0 {
		t.Errorf("%+v", v)
	}
	if _, err := b.do("p", "", ""); kind(err) != client.TaskClosed {
		t.Error(err)
	}
	b.well(b.act(client.VerbStart, "p"))
	if got := b.which("p"); got != "a" {
		t.Errorf("done by %q", got)
	}
	// The keeper's death ends everything, which then comes back.
	pids := b.one("p").PIDs
	info, err := b.c.Info(b.ctx)
	if err != nil || info.Pools != 1 {
		t.Fatal(info, err)
	}
	if err := syscall.Kill(info.KeeperPID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.until("another keeper", func() bool {
		now, err := b.c.Info(b.ctx)
		return err == nil && now.KeeperPID != info.KeeperPID
	})
	b.until("the workers before are gone", b.dead(pids))
	b.until("the pool is back", func() bool {
		s, err := b.do("p", "", "x")
		return err == nil && strings.HasPrefix(s, "a ")
	})
}

// Drain waits for what there is; stop does not, and ends what drains too.
func TestPoolEnds(t *testing.T) {
	b := newBox(t)
	p := b.pool("p", "a")
	p.Grace = config.Duration(200 * time.Millisecond)
	b.up(p)
	hold := func(name string) <-chan error {
		done := make(chan error, 1)
		go func() {
			_, err := b.do("p", "until", b.home+"/"+name)
			done <- err
		}()
		b.until(name+" has begun", b.there(name+".began"))
		return done
	}
	drained := make(chan error, 1)
	one := hold("one")
	go func() {
		_, err := b.c.ActPools(b.ctx, client.ActRequest{Verb: client.VerbDrain, Targets: []string{"p"}})
		drained <- err
	}()
	b.until("nothing new is taken", func() bool { _, err := b.do("p", "", ""); return kind(err) == client.TaskClosed })
	select {
	case err := <-drained:
		t.Fatal("drained with a task under way", err)
	default:
	}
	b.write("one", "")
	if err := errors.Join(<-one, <-drained); err != nil {
		t.Fatal(err)
	}
	if v := b.one("p"); v.State != client.Stopped {
		t.Errorf("%+v", v)
	}

	b.well(b.act(client.VerbRestart, "p"))
	two := hold("two")
	b.well(b.act(client.VerbReload, "p")) // two drains
	pids := b.one("p").PIDs
	b.well(b.act(client.VerbStop, "p"))
	if err := <-two; kind(err) != client.TaskClosed {
		t.Errorf("stopped, the task ends with %v", err)
	}
	b.until("no worker is left", b.dead(pids))
	b.well(b.act(client.VerbDelete, "p"))
	if list, err := b.c.Pools(b.ctx); err != nil || len(list) != 0 {
		t.Error(list, err)
	}
	if strings.Contains(b.read("state.json"), `"pools"`) {
		t.Error(b.read("state.json"))
	}
}

func TestPoolRefusals(t *testing.T) {
	b := newBox(t)
	b.start(b.app("web", "sleep 1000"))
	up := func(pools ...config.Pool) error {
		_, err := b.c.Up(b.ctx, client.UpRequest{Source: "/f.yaml", Pools: pools})
		return err
	}
	bad := b.pool("p", "a")
	bad.Balance = "fair"
	for want, err := range map[string]error{
		`an app is called "web" already`: up(b.pool("web", "a")),
		`balance: "fair" is not known`:   up(bad),
		`"p" is there twice`:             up(b.pool("p", "a"), b.pool("p", "a")),
		`no app is given`:                up(),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, where %q should be", err, want)
		}
	}
	// One that cannot start at all says why, and its tasks fail at once.
	none := b.pool("none", "a")
	none.Command = []string{b.home + "/none"}
	res, err := b.c.Up(b.ctx, client.UpRequest{Source: "/f.yaml", Pools: []config.Pool{none}})
	if err != nil || !strings.Contains(res.Pools[0].Error, "none") || res.Pools[0].State != client.Errored {
		t.Errorf("%+v %v", res, err)
	}
	if _, err := b.do("none", "", ""); kind(err) != client.TaskNoWorkers {
		t.Error(err)
	}
	if _, err := b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{b.app("none", "sleep 9")}}); err == nil || !strings.Contains(err.Error(), "a pool is called") {
		t.Error(err)
	}
	other := b.pool("none", "a")
	if _, err := b.c.Up(b.ctx, client.UpRequest{Source: "/g.yaml", Pools: []config.Pool{other}}); err == nil || !strings.Contains(err.Error(), "/f.yaml") {
		t.Error(err)
	}
	if _, err := b.c.Down(b.ctx, "/f.yaml"); err != nil {
		t.Error(err)
	}
}

// The figures of package client are figures of package pool.
func TestPoolStatsAreThere(t *testing.T) {
	t.Parallel()
	has := func(v any) map[string]bool {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		names := map[string]bool{}
		var walk func(prefix string, m map[string]any)
		walk = func(prefix string, m map[string]any) {
			for k, v := range m {
				names[prefix+k] = true
				if in, ok := v.(map[string]any); ok {
					walk(prefix+k+".", in)
				}
			}
		}
		walk("", m)
		return names
	}
	theirs := has(pool.Stats{Breaker: &pool.BreakerStats{Cause: "x"}, Cache: &pool.CacheStats{}, Verdict: pool.Verdict{Advice: "a"}})
	ours := has(client.PoolStats{Breaker: &client.PoolBreakerStats{Cause: "x"}, Cache: &client.PoolCacheStats{}, Verdict: client.PoolVerdict{Advice: "a"}})
	for name := range ours {
		if !theirs[name] {
			t.Errorf("package pool has no figure %s", name)
		}
	}
	if len(ours) < 80 {
		t.Errorf("only %d figures", len(ours))
	}
}
