package daemon

import (
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
)

const forever = "exec sleep 1000"

// ofFile are apps as up has them.
func ofFile(groups []config.Group, apps ...config.App) client.UpRequest {
	for n := range apps {
		apps[n].Source = "/file.yaml"
	}
	return client.UpRequest{Source: "/file.yaml", Apps: apps, Groups: groups}
}

func actions(res client.ActResult) string {
	var out []string
	for _, c := range res.Changes {
		out = append(out, c.App+":"+c.Action)
	}
	return strings.Join(out, " ")
}

func TestLifeOfApps(t *testing.T) {
	b := newBox(t)
	two := b.app("web", forever)
	two.Instances = 2
	b.start(two, b.app("other", forever))
	before := b.list()

	// A start of what runs is a restart, as with PM2, and counts as one.
	b.well(b.act(client.VerbStart, "web:0"))
	if now := b.list(); now["web:0"].PID == before["web:0"].PID || now["web:0"].Restarts != 1 || now["web:1"].PID != before["web:1"].PID {
		t.Errorf("after a start: %+v", now)
	}
	b.well(b.act(client.VerbStop, "other"))
	if o := b.list()["other:0"]; o.State != client.Stopped || o.PID != 0 {
		t.Errorf("after a stop: %+v", o)
	}
	b.well(b.act(client.VerbRestart, "other"))
	if o := b.list()["other:0"]; o.State != client.Online || o.Restarts != 0 {
		t.Errorf("a start of what was stopped counts as a restart: %+v", o)
	}
	b.well(b.act(client.VerbStop, "other"))

	// Another controller finds all as it was.
	before = b.list()
	b.crash()
	for name, i := range b.list() {
		if w := before[name]; i.PID != w.PID || i.State != w.State || i.Restarts != w.Restarts || i.ID != w.ID {
			t.Errorf("%s after a crash: %+v, was %+v", name, i, w)
		}
	}

	b.well(b.c.Scale(b.ctx, client.ScaleRequest{App: "web", To: "+1"}))
	b.well(b.c.Scale(b.ctx, client.ScaleRequest{App: "web", To: "1"}))
	if now := b.list(); len(now) != 2 || now["web:0"].PID != before["web:0"].PID {
		t.Errorf("after scaling: %+v", now)
	}
	b.well(b.act(client.VerbDelete, "web"))
	if _, err := b.c.List(b.ctx, "web"); !errors.Is(err, client.ErrNoTarget) {
		t.Errorf("after a delete: %v", err)
	}
	b.crash()
	if now := b.list(); len(now) != 1 || now["other:0"].State != client.Stopped {
		t.Errorf("after another crash: %+v", now)
	}
}

func TestWhatIsReadyStaysReadyOverACrash(t *testing.T) {
	b := newBox(t)
	line := b.app("line", "echo I am up; "+forever)
	line.Ready = config.Probe{Type: "log", Pattern: "I am up", Timeout: config.Duration(patience), OnTimeout: "fail"}
	ipc := b.app("ipc", `printf '"ready"\n' >&$NODE_CHANNEL_FD; `+forever)
	ipc.Ready = config.Probe{Type: "ipc", Timeout: config.Duration(patience), OnTimeout: "fail"}
	b.start(line, ipc)
	before := b.list()
	for range 2 {
		b.crash()
		for name, i := range b.list() {
			if i.State != client.Online || i.PID != before[name].PID {
				t.Fatalf("after a crash: %+v", i)
			}
		}
	}
}

// A daemon whose folder was removed still runs its programs, and a second one
// would take them for what a crash left behind.
func TestFolderRemovedUnderTheDaemon(t *testing.T) {
	b := newBox(t)
	b.start(b.app("a", forever))
	info, err := b.c.Info(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	pid := b.list()["a:0"].PID
	if err := errors.Join(os.RemoveAll(b.home), os.MkdirAll(b.home, 0o700)); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.New(b.home).Launch(b.ctx, exe)
	if want := fmt.Sprintf("`kill %d`", info.KeeperPID); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a second daemon: %v, want an error with %s", err, want)
	}
	if syscall.Kill(pid, 0) != nil {
		t.Error("the program was ended")
	}
	if err := syscall.Kill(info.KeeperPID, syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	b.until("the first daemon is gone", func() bool { return syscall.Kill(info.KeeperPID, 0) != nil && syscall.Kill(pid, 0) != nil })
}

// What comes and goes leaves no descriptor behind, in neither process.
func TestNothingLeaks(t *testing.T) {
	b := newBox(t)
	info, err := b.c.Info(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	group := []config.Group{{Name: "g", Strategy: "one-for-all"}}
	round := func(n int) {
		plain, watched, ready := b.app(fmt.Sprintf("plain%d", n), "echo hello; "+forever), b.app(fmt.Sprintf("watched%d", n), forever), b.app(fmt.Sprintf("ready%d", n), "echo up; "+forever)
		watched.Watch = &config.Watch{Paths: []string{b.home}, Ignore: []string{"**"}, Debounce: config.Duration(time.Second)}
		ready.Ready = config.Probe{Type: "log", Pattern: "up", Timeout: config.Duration(patience), OnTimeout: "fail"}
		plain.Strategy = "g"
		b.well(b.c.Up(b.ctx, ofFile(group, plain, watched, ready)))
		b.well(b.act(client.VerbRestart, "all"))
		b.well(b.c.Down(b.ctx, "/file.yaml"))
		b.c.Close()
	}
	open := func(pid int) int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	round(0)
	keeper, controller := open(info.KeeperPID), open(info.PID)
	for n := range 4 {
		round(n + 1)
	}
	b.until("all is closed", func() bool { return open(info.KeeperPID) <= keeper && open(info.PID) <= controller })
}

func TestNothingIsForgottenWhenTheDaemonIsEnded(t *testing.T) {
	b := newBox(t)
	job := b.app("job", "echo x >>jobs")
	job.Restart.Policy = "never"
	b.start(b.app("web", forever), b.app("off", forever))
	if _, err := b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{job}}); err != nil {
		t.Fatal(err)
	}
	b.become("job:0", client.Stopped)
	b.well(b.act(client.VerbStop, "off"))
	info, err := b.c.Info(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(info.KeeperPID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.until("the daemon ends", func() bool {
		_, err := b.c.Info(b.ctx)
		return errors.Is(err, client.ErrUnreachable)
	})
	b.launch()
	b.become("web:0", client.Online)
	if now := b.list(); now["off:0"].State != client.Stopped || now["job:0"].State != client.Stopped || len(b.lines("jobs")) != 1 {
		t.Errorf("the next daemon has %+v; the job ran %d times", now, len(b.lines("jobs")))
	}
}

func TestGroups(t *testing.T) {
	b := newBox(t)
	groups := []config.Group{{Name: "g", Strategy: "one-for-all"}, {Name: "inner", Parent: "g", Strategy: "rest-for-one"}}
	job := b.app("job", "echo x >>jobs")
	job.Restart.Policy = "never"
	web, deep := b.app("web", forever), b.app("deep", forever)
	job.Strategy, web.Strategy, deep.Strategy = "g", "g", "inner"
	file := func() client.UpRequest { return ofFile(groups, job, web, deep) }
	res := b.well(b.c.Up(b.ctx, file()))
	for _, o := range res.Instances {
		if o.App != "job" && o.State != client.Online {
			t.Errorf("up returned with %s %s", o.App, o.State)
		}
	}
	b.become("job:0", client.Stopped)
	if res := b.well(b.c.Up(b.ctx, file())); actions(res) != "job:none web:none deep:none" {
		t.Errorf("a second up: %s", actions(res))
	}
	before := b.list()
	for range 3 {
		b.crash()
		for _, name := range []string{"web:0", "deep:0"} {
			if i := b.list()[name]; i.State != client.Online || i.PID != before[name].PID {
				t.Errorf("after a crash: %+v", i)
			}
		}
	}
	if now := b.list()["job:0"]; now.State != client.Stopped || len(b.lines("jobs")) != 1 {
		t.Errorf("the job that was done ran %d times: %+v", len(b.lines("jobs")), now)
	}

	// A group that changes takes effect.
	groups[0].Strategy = "one-for-one"
	if res := b.well(b.c.Up(b.ctx, file())); strings.Contains(actions(res), "none") || !strings.Contains(fmt.Sprint(res.Changes), "one-for-one") {
		t.Errorf("another strategy: %v", res.Changes)
	}
	// So does an app that moves.
	web.Strategy = ""
	if res := b.well(b.c.Up(b.ctx, file())); actions(res) != "job:none web:change deep:none" {
		t.Errorf("an app moves out: %s", actions(res))
	}
	if res := b.well(b.c.Up(b.ctx, file())); actions(res) != "job:none web:none deep:none" {
		t.Errorf("it has moved: %s", actions(res))
	}
	// Nothing of a group is left behind.
	b.well(b.c.Down(b.ctx, "/file.yaml"))
	if st, err := readState(filepath.Join(b.home, "state.json")); err != nil || len(st.Groups)+len(st.Apps) > 0 {
		t.Errorf("down leaves %+v, %v", st, err)
	}
}

// A group that gave up comes back with the first of its apps that is started.
func TestGroupThatGaveUp(t *testing.T) {
	b := newBox(t)
	group := []config.Group{{Name: "g", Strategy: "one-for-all", MaxRestarts: 1, Window: config.Duration(time.Minute)}}
	bad, good := b.app("bad", "[ ! -e bad ] || exit 3; "+forever), b.app("good", forever)
	bad.Restart.BackoffInitial, bad.Strategy, good.Strategy = 0, "g", "g"
	b.write("bad", "")
	if _, err := b.c.Up(b.ctx, ofFile(group, good, bad)); err != nil {
		t.Fatal(err)
	}
	b.become("bad:0", client.Errored)
	b.become("good:0", client.Errored)
	b.until("that is on record", func() bool {
		st, err := readState(filepath.Join(b.home, "state.json"))
		return err == nil && !slices.ContainsFunc(st.Apps, func(a appState) bool { return a.Instances[0].State != client.Errored })
	})
	b.crash()
	if now := b.list(); now["bad:0"].State != client.Errored || now["good:0"].State != client.Errored {
		t.Errorf("after a crash: %+v", now)
	}
	if err := os.Remove(filepath.Join(b.home, "bad")); err != nil {
		t.Fatal(err)
	}
	b.well(b.act(client.VerbRestart, "all"))
	pid := b.become("good:0", client.Online).PID
	b.become("bad:0", client.Online)

	// Once more, without a crash between.
	b.write("bad", "")
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.become("good:0", client.Errored)
	if err := os.Remove(filepath.Join(b.home, "bad")); err != nil {
		t.Fatal(err)
	}
	b.until("both are back", func() bool { // the group may be in the middle of giving up
		if _, err := b.act(client.VerbStart, "bad"); err != nil {
			t.Fatal(err)
		}
		now := b.list()
		return now["bad:0"].State == client.Online && now["good:0"].State == client.Online
	})
}

func TestUpLeavesAloneWhatIsAsItShallBe(t *testing.T) {
	b := newBox(t)
	web, manual := b.app("web", forever), b.app("manual", forever)
	web.Instances, manual.Autostart = 3, false
	b.well(b.c.Up(b.ctx, ofFile(nil, web, manual)))
	b.well(b.act(client.VerbStop, "web:1"))
	before := b.list()
	if res := b.well(b.c.Up(b.ctx, ofFile(nil, web, manual))); actions(res) != "web:start manual:none" {
		t.Errorf("one is stopped: %s", actions(res))
	}
	now := b.list()
	if now["web:0"].PID != before["web:0"].PID || now["web:2"].PID != before["web:2"].PID || now["web:1"].State != client.Online {
		t.Errorf("one was stopped: %+v, before %+v", now, before)
	}

	// What is not to start by itself does not start because it changes; what
	// is stopped and shall run starts whatever else changes.
	b.well(b.act(client.VerbStop, "web:0"))
	web.Instances = 2
	manual.Env = map[string]string{"A": "2"}
	res := b.well(b.c.Up(b.ctx, ofFile(nil, web, manual)))
	if now = b.list(); now["manual:0"].State != client.Stopped || now["web:0"].State != client.Online || len(now) != 3 {
		t.Errorf("%s: %+v", actions(res), now)
	}
	if res := b.well(b.c.Up(b.ctx, ofFile(nil, web, manual))); actions(res) != "web:none manual:none" {
		t.Errorf("up again: %s", actions(res))
	}
	// An app that left the file goes.
	if res := b.well(b.c.Up(b.ctx, ofFile(nil, web))); actions(res) != "web:none manual:remove" || len(b.list()) != 2 {
		t.Errorf("one less: %s", actions(res))
	}
}

// A controller that is killed between the stop of the old run and the start of
// the new one has another finish the work.
func TestUpIsFinishedAfterACrash(t *testing.T) {
	b := newBox(t)
	a := b.app("web", `trap '' TERM; echo $MARK >>marks; while :; do sleep 0.1; done`)
	a.Stop.Grace = config.Duration(500 * time.Millisecond)
	a.Env = map[string]string{"MARK": "old"}
	b.well(b.c.Up(b.ctx, ofFile(nil, a)))
	b.until("it runs", func() bool { return len(b.lines("marks")) == 1 })
	a.Stop.Grace = config.Duration(patience) // so that it is killed in the middle
	a.Env = map[string]string{"MARK": "new"}
	done := make(chan error, 1)
	go func() {
		_, err := b.c.Up(b.ctx, ofFile(nil, a))
		done <- err
	}()
	b.become("web:0", client.Stopping)
	pid := b.list()["web:0"].PID
	b.crash()
	if err := <-done; err == nil {
		t.Error("up ended well although its controller was killed")
	}
	b.until("the new one is asked for", func() bool { return b.list()["web:0"].State == client.Stopping })
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.until("the new one runs", func() bool { return slices.Equal(b.lines("marks"), []string{"old", "new"}) })
	pid = b.become("web:0", client.Online).PID
	b.crash()
	if i := b.list()["web:0"]; i.PID != pid || i.State != client.Online {
		t.Errorf("it was restarted once more: %+v", i)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func TestResurrect(t *testing.T) {
	b := newBox(t)
	job := b.app("job", "echo x >>jobs")
	job.Restart.Policy = "never"
	b.start(b.app("web", forever), b.app("off", forever))
	if _, err := b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{job}}); err != nil {
		t.Fatal(err)
	}
	b.well(b.act(client.VerbStop, "off"))
	if saved, err := b.c.Save(b.ctx, false); err != nil || saved.Apps != 3 {
		t.Fatalf("%+v, %v", saved, err)
	}
	b.well(b.act(client.VerbDelete, "all"))
	if _, err := b.c.Resurrect(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.become("web:0", client.Online)
	b.until("the job is done again and that is on record", func() bool {
		st, err := readState(filepath.Join(b.home, "state.json"))
		return err == nil && len(b.lines("jobs")) == 2 && slices.ContainsFunc(st.Apps, func(a appState) bool {
			return a.Spec.Name == "job" && a.Instances[0].State == client.Stopped
		})
	})
	b.crash()
	if now := b.list(); now["off:0"].State != client.Stopped || now["job:0"].State != client.Stopped || now["web:0"].State != client.Online || len(b.lines("jobs")) != 2 {
		t.Errorf("%+v; the job ran %d times", now, len(b.lines("jobs")))
	}
	b.well(b.c.Resurrect(b.ctx)) // nothing is missing
}

func TestResetIsRemembered(t *testing.T) {
	b := newBox(t)
	b.start(b.app("web", forever))
	b.well(b.act(client.VerbRestart, "web"))
	b.well(b.act(client.VerbReset, "web"))
	b.crash()
	if n := b.list()["web:0"].Restarts; n != 0 {
		t.Errorf("%d restarts", n)
	}
}

func TestWatchThatCannotBe(t *testing.T) {
	b := newBox(t)
	a := b.app("web", forever)
	a.Watch = &config.Watch{Paths: []string{filepath.Join(b.home, "not", "there")}, Debounce: config.Duration(time.Second)}
	b.start(a)
	if i := b.list()["web:0"]; i.State != client.Online {
		t.Errorf("%+v", i)
	}
	for e, err := range b.c.Events(b.ctx, 0, true) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Type == "app.watch-trouble" {
			break
		}
	}
}

func TestStartThatCannotBeSaved(t *testing.T) {
	b := newBox(t)
	inTheWay := filepath.Join(b.home, "state.json.tmp")
	if err := os.Mkdir(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	req := client.StartRequest{Apps: []config.App{b.app("web", forever)}}
	if _, err := b.c.Start(b.ctx, req); err == nil {
		t.Fatal("no error")
	}
	if now := b.list(); len(now) > 0 {
		t.Errorf("it is there nevertheless: %+v", now)
	}
	if _, err := b.c.Up(b.ctx, ofFile(nil, b.app("web", forever))); err == nil {
		t.Fatal("up: no error")
	}
	if now := b.list(); len(now) > 0 {
		t.Errorf("it is there after up: %+v", now)
	}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	b.well(b.c.Start(b.ctx, req))
}

// A cycle that closes only over several commands is refused, and what was
// there goes on as it was.
func TestCycleOverSeveralStarts(t *testing.T) {
	b := newBox(t)
	x, y := b.app("x", forever), b.app("y", forever)
	b.start(x)
	y.DependsOn = map[string]string{"x": "started"}
	b.start(y)
	pid := b.list()["x:0"].PID
	x.DependsOn = map[string]string{"y": "started"}
	if _, err := b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{x}}); err == nil || !strings.Contains(err.Error(), "cycle") {
		t.Errorf("error %v", err)
	}
	b.well(b.act(client.VerbReset, "all")) // which saves
	b.crash()
	if i := b.list()["x:0"]; i.PID != pid || i.State != client.Online {
		t.Errorf("%+v", i)
	}
	if now := b.list()["y:0"]; now.State != client.Online {
		t.Errorf("%+v", now)
	}
}

// A stop whose instance is started again meanwhile returns.
func TestStopAndRestartAtOnce(t *testing.T) {
	b := newBox(t)
	b.start(b.app("web", `trap 'sleep 0.5; exit 0' TERM; echo x >>up; while :; do sleep 0.02; done`))
	b.until("it runs", func() bool { return len(b.lines("up")) == 1 })
	done := make(chan error, 1)
	go func() {
		_, err := b.act(client.VerbStop, "web")
		done <- err
	}()
	b.become("web:0", client.Stopping)
	b.well(b.act(client.VerbRestart, "web"))
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience / 2):
		t.Error("the stop hangs")
	}
}

func TestDeleteOfWhatIsStarting(t *testing.T) {
	b := newBox(t)
	a := b.app("web", forever)
	a.Ready = config.Probe{Type: "log", Pattern: "never", Timeout: config.Duration(patience), OnTimeout: "fail"}
	done := make(chan client.ActResult, 1)
	go func() {
		res, err := b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{a}})
		if err != nil {
			t.Error(err)
		}
		done <- res
	}()
	b.until("it starts", func() bool { return b.list()["web:0"].PID > 0 })
	b.well(b.act(client.VerbDelete, "web"))
	select {
	case res := <-done:
		if len(res.Instances) != 1 || res.Instances[0].Error == "" {
			t.Errorf("start says %+v", res.Instances)
		}
	case <-time.After(patience / 2):
		t.Error("the start hangs")
	}
}

// Whatever commands come at once, none hangs, none fails for another's doing,
// and in the end what shall run runs once.
func TestManyCommandsAtOnce(t *testing.T) {
	b := newBox(t)
	b.start(b.app("web", "echo $$ >>pids; "+forever))
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			for range 5 {
				res, err := b.act(client.VerbRestart, "web")
				if err != nil {
					t.Errorf("restart: %v", err)
				}
				for _, o := range res.Instances {
					if o.Error != "" && !strings.Contains(o.Error, "stopped meanwhile") {
						t.Errorf("restart: %s", o.Error)
					}
				}
			}
		})
		wg.Go(func() {
			name := fmt.Sprintf("passing%d", n)
			for range 3 {
				if _, err := b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{b.app(name, forever)}}); err != nil {
					t.Errorf("start: %v", err)
				}
				if _, err := b.act(client.VerbReset, "all"); err != nil {
					t.Errorf("reset all: %v", err)
				}
				if n == 0 {
					if _, err := b.act(client.VerbStop, "all"); err != nil {
						t.Errorf("stop all: %v", err)
					}
				}
				if _, err := b.act(client.VerbDelete, name); err != nil {
					t.Errorf("delete: %v", err)
				}
			}
		})
	}
	wg.Wait()
	b.well(b.act(client.VerbRestart, "web"))
	now := b.list()
	if len(now) != 1 || now["web:0"].State != client.Online {
		t.Errorf("%+v", now)
	}
	for _, pid := range b.lines("pids") {
		if _, err := os.Stat("/proc/" + pid); err == nil && pid != fmt.Sprint(now["web:0"].PID) {
			t.Errorf("pid %s runs besides %d", pid, now["web:0"].PID)
		}
	}
}

func TestReloadStopsAtTheFirstFailure(t *testing.T) {
	b := newBox(t)
	a := b.app("a", "[ ! -e bad ] || exit 3; "+forever)
	a.Restart.Policy = "never"
	b.start(a, b.app("b", forever))
	b.well(b.c.Scale(b.ctx, client.ScaleRequest{App: "a", To: "3"})) // so the ids are a, b, a, a
	b.write("bad", "")
	before := b.list()
	res, err := b.act(client.VerbReload, "all")
	if err != nil {
		t.Fatal(err)
	}
	failed := map[string]string{}
	for _, o := range res.Instances {
		failed[fmt.Sprintf("%s:%d", o.App, o.Index)] = o.Error
	}
	now := b.list()
	if !strings.Contains(failed["a:0"], "code 3") || !strings.Contains(failed["a:1"], "a:0") || !strings.Contains(failed["a:2"], "a:0") || failed["b:0"] != "" || len(failed) != 4 {
		t.Errorf("said %q", failed)
	}
	if now["a:1"].PID != before["a:1"].PID || now["a:2"].PID != before["a:2"].PID || now["b:0"].PID == before["b:0"].PID {
		t.Errorf("%+v, before %+v", now, before)
	}
}

// A new run is looked at for its first moments, however long the old one took
// to go.
func TestRestartTellsOfADeathAfterALongStop(t *testing.T) {
	b := newBox(t)
	a := b.app("web", `if [ -e bad ]; then echo it is bad >&2; exit 3; fi
		trap 'sleep 1.2; exit 0' TERM; echo x >>up; while :; do sleep 0.02; done`)
	a.Restart.Policy = "never"
	b.start(a)
	b.until("it runs", func() bool { return len(b.lines("up")) == 1 })
	b.write("bad", "")
	res, err := b.act(client.VerbRestart, "web")
	if err != nil || len(res.Instances) != 1 || !strings.Contains(res.Instances[0].Error, "code 3") || !slices.Contains(res.Instances[0].LastErr, "it is bad") {
		t.Errorf("%+v, %v", res.Instances, err)
	}
}

func TestRefusals(t *testing.T) {
	b := newBox(t)
	none := b.app("none", forever)
	none.Instances = 0
	if _, err := b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{none}}); err == nil {
		t.Error("an app without instances was taken")
	}
	b.start(b.app("web", forever))
	if _, err := b.act(client.VerbDelete); err == nil || len(b.list()) != 1 {
		t.Error("a delete of nothing in particular deletes")
	}
	for _, env := range []map[string]string{{"": "x"}, {"A=B": "x"}, {"A": "x\x00y"}} {
		var refused *client.Error
		if _, err := b.c.Act(b.ctx, client.ActRequest{Verb: client.VerbRestart, Targets: []string{"web"}, Env: env}); !errors.As(err, &refused) {
			t.Errorf("%q: %v", env, err)
		}
	}
	// What a hand has put into the dump is checked like anything else.
	bad := sampleState("web2")
	if err := writeJSON(filepath.Join(b.home, "dump.json"), bad); err != nil {
		t.Fatal(err)
	}
	if _, err := b.c.Resurrect(b.ctx); err == nil || len(b.list()) != 1 {
		t.Errorf("resurrect of an app without a command: %v, %+v", err, b.list())
	}
}

func TestSecretsAreMasked(t *testing.T) {
	got := masked(map[string]string{"API_TOKEN": "x", "DATABASE_URL": "postgres://me:hush@db/x", "HOME_URL": "http://x@y/", "EMPTY_KEY": ""})
	for k, want := range map[string]string{"API_TOKEN": "********", "DATABASE_URL": "********", "HOME_URL": "http://x@y/", "EMPTY_KEY": ""} {
		if got[k] != want {
			t.Errorf("%s: %q", k, got[k])
		}
	}
}

// Commands that are cut off by crashes leave nothing that the list does not
// show, nothing twice and nothing stuck.
func TestCommandsCutOffByCrashes(t *testing.T) {
	b := newBox(t)
	stubborn := b.app("stubborn", `trap 'sleep 0.2; exit 0' TERM; while :; do sleep 0.02; done`)
	stubborn.Strategy = "g"
	group := []config.Group{{Name: "g", Strategy: "one-for-all"}}
	file := func(n int) client.UpRequest {
		a := b.app("steady", forever)
		a.Instances = 1 + n%3
		a.Env = map[string]string{"N": fmt.Sprint(n / 2)}
		a.Strategy = []string{"", "g"}[n%2]
		apps := []config.App{a, stubborn}
		if n%4 == 3 {
			apps = apps[:1]
		}
		return ofFile(group, apps...)
	}
	for n := range 6 {
		var wg sync.WaitGroup
		for _, do := range []func(){
			func() { _, _ = b.c.Up(b.ctx, file(n)) },
			func() { _, _ = b.act(client.VerbRestart, "all") },
			func() { _, _ = b.c.Start(b.ctx, client.StartRequest{Apps: []config.App{b.app("passing", forever)}}) },
			func() { _, _ = b.act(client.VerbDelete, "passing") },
			func() { _, _ = b.act(client.VerbReload, "all") },
			func() { _, _ = b.act(client.VerbStop, "stubborn") },
		} {
			wg.Go(do)
		}
		time.Sleep(time.Duration(n*n) * 8 * time.Millisecond) // at another point each time
		b.crash()
		wg.Wait()
	}
	b.well(b.c.Up(b.ctx, file(2)))
	if res := b.well(b.c.Up(b.ctx, file(2))); actions(res) != "steady:none stubborn:none" {
		t.Errorf("a second up: %s", actions(res))
	}
	_, _ = b.act(client.VerbDelete, "passing") // it may or may not be there
	now := b.list()
	if len(now) != 4 {
		t.Errorf("there is %+v", now)
	}
	listed := map[string]bool{}
	for name := range now { // one that a crash cut off may be in its backoff
		listed[fmt.Sprint(b.become(name, client.Online).PID)] = true
	}
	b.until("nothing runs but what is listed", func() bool {
		for pid, ppid := range processes(t, Tag(b.home)) {
			if !listed[pid] && !listed[ppid] {
				return false
			}
		}
		return true
	})
}

// processes are the pids of a home, and their parents.
func processes(t *testing.T, tag string) map[string]string {
	t.Helper()
	found := map[string]string{}
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		env, err := os.ReadFile(f)
		if err != nil || !strings.Contains(string(env), "REMUDA_RUN="+tag) {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(filepath.Dir(f), "stat"))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if w := strings.Fields(rest); len(w) > 1 {
			found[filepath.Base(filepath.Dir(f))] = w[1]
		}
	}
	return found
}
