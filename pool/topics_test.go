package pool

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/ipc"
)

const pythonTopics = `
import sys
sys.path.insert(0, 'SDK')
import remuda_worker
said = lambda topic, body: task.publish('said/' + topic[4:], b'python: ' + body)
def keep(t):
    global task
    task = t
remuda_worker.serve({'': keep, 'publish': lambda t: t.publish('say/publish', t.body)}, {'say/*': said, 'nothing': said})
`

// Workers of two pools and the program itself talk about topics.
func TestTopics(t *testing.T) {
	topics := ipc.NewTopics()
	gos := newPool(t, Options{Size: 2, Topics: topics})
	py := newPool(t, Options{Command: []string{"python3", write(t, "w.py", strings.ReplaceAll(pythonTopics, "SDK", sdkPath(t, "python")))}, Size: 1, Topics: topics})
	ctx := limit(t)
	// A worker that has answered has subscribed before.
	for gos.Stats().Up < 2 {
		time.Sleep(time.Millisecond)
	}
	if _, err := gos.Broadcast(ctx, Task{}); err != nil {
		t.Fatal(err)
	}
	if _, err := py.Do(ctx, Task{}); err != nil {
		t.Fatal(err)
	}
	s, err := gos.Subscribe("said/*", ipc.SubscribeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	hear := func(want string) {
		t.Helper()
		heard := map[string]int{}
		for range 3 {
			m, err := s.Receive(ctx)
			if err != nil {
				t.Fatal(err)
			}
			heard[m.Topic+" "+string(m.Body)]++
		}
		if fmt.Sprint(heard) != want {
			t.Errorf("heard %v, want %s", heard, want)
		}
	}
	for range 3 {
		if err := py.Publish("say/x", []byte("hi")); err != nil {
			t.Fatal(err)
		}
		hear("map[said/x go: hi:2 said/x python: hi:1]")
	}
	for _, p := range []*Pool{gos, py} {
		if _, err := p.Do(ctx, Task{Name: "publish", Body: []byte("task")}); err != nil {
			t.Fatal(err)
		}
		hear("map[said/publish go: task:2 said/publish python: task:1]")
	}
	var we *WorkerError
	if _, err := gos.Do(ctx, Task{Name: "flood"}); !errors.As(err, &we) || !strings.Contains(we.Cause, "in a second") {
		t.Errorf("a flood of messages: %v", err)
	}
	if _, err := gos.Do(ctx, Task{}); err != nil {
		t.Error(err)
	}
	if n := gos.Stats().Died; n != 1 {
		t.Errorf("%d workers died of one that floods", n)
	}
}
