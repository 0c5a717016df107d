package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/remuda-dev/remuda/internal/config"
)

func sampleState(names ...string) state {
	st := state{Version: stateVersion, NextID: len(names)}
	for n, name := range names {
		st.Apps = append(st.Apps, appState{Spec: config.App{Name: name}, Instances: []instanceState{{ID: n, Run: true}}})
	}
	return st
}

func TestStateSurvivesDamage(t *testing.T) {
	good, err := os.ReadFile(written(t, sampleState("web")))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name      string
		main, bak string // "" is no file
		apps      int
		warning   string
		err       string
	}{
		{name: "nothing there"},
		{name: "gone, copy whole", bak: string(good), apps: 1, warning: "is gone"},
		{name: "gone, copy damaged", bak: "{", err: "move it away"},
		{name: "whole", main: string(good), apps: 1},
		{name: "damaged, copy whole", main: string(good[:len(good)/2]), bak: string(good), apps: 1, warning: "moved to"},
		{name: "emptied, copy whole", main: " ", bak: string(good), apps: 1, warning: "moved to"},
		{name: "both damaged", main: "{", bak: "[]", err: "move both away"},
		{name: "damaged, no copy", main: "{", err: "nor can its copy"},
		{name: "of the future", main: `{"version": 99, "apps": "unreadable"}`, bak: string(good), err: "version 99"},
		{name: "no version", main: `{}`, err: "no version"},
		{name: "wrong shape", main: `{"version":1,"apps":{}}`, err: "cannot be read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.json")
			for p, content := range map[string]string{path: c.main, path + ".bak": c.bak} {
				if content != "" {
					if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			st, warning, err := loadState(path)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want one with %q", err, c.err)
				}
				if b, rerr := os.ReadFile(path); c.main != "" && (rerr != nil || string(b) != c.main) {
					t.Fatalf("the file was touched: %v", rerr)
				}
				return
			}
			if err != nil || len(st.Apps) != c.apps || !strings.Contains(warning, c.warning) || (c.warning == "") != (warning == "") {
				t.Fatalf("%d apps, warning %q, error %v", len(st.Apps), warning, err)
			}
		})
	}
}

func written(t *testing.T, st state) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.json")
	if err := writeJSON(path, st); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFutureStateIsItsOwnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	if err := os.WriteFile(path, []byte(`{"version":2}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := loadState(path); !errors.Is(err, errFuture) {
		t.Fatal(err)
	}
}

// What a save that returned had seen is on the disk, however many saves were
// made at once; and they share writes.
func TestConcurrentSaves(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	var mu sync.Mutex
	var names []string
	writes := 0
	s := newStore(path, func() state {
		mu.Lock()
		defer mu.Unlock()
		writes++
		return sampleState(names...)
	}, nil)
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			name := string(rune('A' + n))
			mu.Lock()
			names = append(names, name)
			mu.Unlock()
			if err := s.save(); err != nil {
				t.Error(err)
			}
			st, err := readState(path)
			if err != nil {
				t.Error(err)
				return
			}
			for _, a := range st.Apps {
				if a.Spec.Name == name {
					return
				}
			}
			t.Errorf("%s was saved and is not in the file", name)
		})
	}
	wg.Wait()
	if writes > 50 {
		t.Errorf("%d writes for 50 saves", writes)
	}
}

func TestSaveFails(t *testing.T) {
	s := newStore(filepath.Join(t.TempDir(), "gone", "state.json"), func() state { return state{} }, nil)
	if err := s.save(); err == nil {
		t.Fatal("no error")
	}
	if s.failed() == nil {
		t.Fatal("the failure is not remembered")
	}
}
