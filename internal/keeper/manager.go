package keeper

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// manager is the service manager above the keeper: systemd, or whatever else
// speaks sd_notify. Its zero value is none.
type manager struct {
	socket   string
	watchdog time.Duration // how often it wants to hear, 0 never
}

// newManager takes the service manager's variables out of the environment, so
// that no child takes itself for the service.
func newManager() manager {
	var m manager
	m.socket = os.Getenv("NOTIFY_SOCKET")
	if usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64); err == nil && usec > 0 {
		if pid := os.Getenv("WATCHDOG_PID"); pid == "" || pid == strconv.Itoa(os.Getpid()) {
			m.watchdog = time.Duration(usec) * time.Microsecond / 2
		}
	}
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); ofManager(name) {
			_ = os.Unsetenv(name)
		}
	}
	return m
}

// ofManager reports whether a variable is meant for the service itself.
func ofManager(name string) bool {
	return name == "NOTIFY_SOCKET" || name == "WATCHDOG_USEC" || name == "WATCHDOG_PID"
}

// ticker ticks where there is a watchdog, and never otherwise.
func (m manager) ticker() <-chan time.Time {
	if m.watchdog <= 0 || m.socket == "" {
		return nil
	}
	return time.NewTicker(m.watchdog).C
}

// status passes on what the controller says of itself.
func (m manager) status(state uint8, text string) error {
	if len(text) > 1000 || strings.ContainsAny(text, "\n\x00") {
		return fmt.Errorf("keeper: a status of %d bytes: want one line of at most 1000", len(text))
	}
	switch state {
	case statusReady:
		msg := "READY=1\nMAINPID=" + strconv.Itoa(os.Getpid())
		if text != "" {
			msg += "\nSTATUS=" + text
		}
		m.notify(msg)
	case statusStopping:
		m.notify("STOPPING=1")
	default:
		return fmt.Errorf("keeper: unknown status %d", state)
	}
	return nil
}

// notify sends one datagram. That it may fail is the service manager's
// business: nothing here would get better by stopping.
func (m manager) notify(text string) {
	if m.socket == "" || m.socket[0] != '/' && m.socket[0] != '@' {
		return
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer func() { _ = unix.Close(fd) }()
	_ = unix.Sendto(fd, []byte(text), unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: m.socket})
}
