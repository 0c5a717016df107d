package config

import (
	"strings"
	"testing"
)

func TestSockets(t *testing.T) {
	for in, want := range map[string]string{
		"8080":                         "tcp [::]:8080",
		":8080":                        "tcp [::]:8080",
		"*:8080":                       "tcp [::]:8080",
		"localhost:8080":               "tcp 127.0.0.1:8080",
		"0.0.0.0:80":                   "tcp 0.0.0.0:80",
		"[::1]:80":                     "tcp [::1]:80",
		"tcp://127.0.0.1:80":           "tcp 127.0.0.1:80",
		"udp://:53":                    "udp [::]:53",
		"udp://127.0.0.1:53":           "udp 127.0.0.1:53",
		"[fe80::1%eth0]:80":            "tcp [fe80::1%eth0]:80",
		"/run/x.sock":                  "unix /run/x.sock",
		"./x.sock":                     "unix /srv/x.sock",
		"unix:/run/x.sock":             "unix /run/x.sock",
		"unix:///run/x.sock":           "unix /run/x.sock",
		"~/x.sock":                     "unix /home/me/x.sock",
		"":                             "",
		"web":                          "",
		"0.0.0.0":                      "",
		"0.0.0.0:99999":                "",
		"sctp://0.0.0.0:80":            "",
		"/" + strings.Repeat("x", 107): "",
	} {
		s := Socket{Listen: listenAt(in, "/srv", "/home/me")}
		network, addr, path, err := s.Address()
		got := network + " " + path
		if network != "unix" {
			got = network + " " + addr.String()
		}
		if err != nil {
			got = ""
		}
		if got != want {
			t.Errorf("%q: %q (%v), want %q", in, got, err, want)
		}
	}
}

// FuzzSocketAddress: what a person writes never panics, and what is valid stays
// what it is when it is written again.
func FuzzSocketAddress(f *testing.F) {
	for _, s := range []string{"8080", ":80", "udp://[::]:53", "unix:x", "/run/x", "[fe80::1%lo]:1", "tcp://"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s := Socket{Listen: listenAt(in, "/srv", "/home/me")}
		if _, _, _, err := s.Address(); err != nil {
			return
		}
		if again := listenAt(s.Listen, "/elsewhere", ""); again != s.Listen {
			t.Errorf("%q becomes %q and then %q", in, s.Listen, again)
		}
	})
}

func TestSocketsDiffer(t *testing.T) {
	a := App{Sockets: []Socket{{Name: "web", Listen: "0.0.0.0:80"}}}
	b := App{Sockets: []Socket{{Name: "web", Listen: "0.0.0.0:80", Backlog: 10}}}
	if got := Diff(a, b); len(got) != 1 || !strings.Contains(got[0], "backlog 10") {
		t.Errorf("%q", got)
	}
}
