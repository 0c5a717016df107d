package config

import (
	"strings"

	"golang.org/x/sys/unix"
)

// signalName is s in the form the rest of the program uses, "SIGTERM", from
// "term", "SIGTERM" or "15". What is no signal comes back as it is.
func signalName(s string) string {
	t := strings.ToUpper(strings.TrimSpace(s))
	if n, ok := intOf(t); ok && n > 0 && n < 65 {
		if name := unix.SignalName(unix.Signal(n)); name != "" {
			return name
		}
		return s
	}
	if t != "" && !strings.HasPrefix(t, "SIG") {
		t = "SIG" + t
	}
	if unix.SignalNum(t) == 0 {
		return s
	}
	return t
}

func knownSignal(s string) bool { return strings.HasPrefix(s, "SIG") && unix.SignalNum(s) != 0 }
