package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/remuda-dev/remuda/internal/config"
)

func TestCollide(t *testing.T) {
	for _, c := range []struct {
		a, b           string
		aReuse, bReuse bool
		want           bool
	}{
		{a: "0.0.0.0:80", b: "0.0.0.0:80"}, // it is one socket
		{a: "0.0.0.0:80", b: "0.0.0.0:80", aReuse: true, want: true},
		{a: "0.0.0.0:80", b: "127.0.0.1:80", want: true},
		{a: "[::]:80", b: "127.0.0.1:80", want: true},
		{a: "[::]:80", b: "127.0.0.1:80", aReuse: true, bReuse: true},
		{a: "127.0.0.2:80", b: "127.0.0.1:80"},
		{a: "[::]:80", b: "127.0.0.1:81"},
		{a: "[::]:80", b: "udp://127.0.0.1:80"},
		{a: "/run/a", b: "/run/b"}, // their ports are both none
	} {
		a, b := config.Socket{Listen: c.a, ReusePort: c.aReuse}, config.Socket{Listen: c.b, ReusePort: c.bReuse}
		if collide(a, b) != c.want || collide(b, a) != c.want {
			t.Errorf("%v and %v: want %v", a, b, c.want)
		}
	}
}

// TestOldClusters: cluster mode of what is not Node, which is refused now, does
// not keep what was saved before from coming back.
func TestOldClusters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dump.json")
	const dump = `{"version": 1, "apps": [
		{"spec": {"name": "a", "exec_mode": "cluster", "interpreter": "python3"}},
		{"spec": {"name": "b", "exec_mode": "cluster", "interpreter": "/usr/bin/node"}}]}`
	if err := os.WriteFile(path, []byte(dump), 0o600); err != nil {
		t.Fatal(err)
	}
	st, err := readState(path)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := st.Apps[0].Spec.ExecMode, st.Apps[1].Spec.ExecMode; a != "fork" || b != "cluster" {
		t.Errorf("%s, %s", a, b)
	}
}
