package daemon

import (
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
