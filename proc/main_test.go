package proc

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// modeVar makes the test binary one of the programs that the tests run.
const modeVar = "PROC_TEST_MODE"

func TestMain(m *testing.M) {
	switch mode := os.Getenv(modeVar); {
	case mode == "":
		goleak.VerifyTestMain(m)
	case strings.HasPrefix(mode, "family"):
		family(mode)
	case mode == "owner":
		owner()
	case mode == "unprivileged":
		os.Exit(m.Run())
	default:
		fmt.Fprintln(os.Stderr, "unknown mode", mode)
		os.Exit(2)
	}
}

// family is a program that ignores SIGTERM and leaves grandchildren that do
// the same, in sessions of their own, their parents gone. It writes a line
// with its pid to descriptor 3, which all inherit.
func family(mode string) {
	signal.Ignore(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT)
	pipe := os.NewFile(3, "pipe")
	child := func(mode string) {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), modeVar+"="+mode)
		cmd.ExtraFiles = []*os.File{pipe}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	switch mode {
	case "family": // the leader lives on
		child("family-middle")
		child("family-last")
	case "family-exit": // the leader exits with 3 when its child is up
		child("family-middle")
		child("family-last")
		fmt.Fprintln(pipe, os.Getpid())
		time.Sleep(50 * time.Millisecond)
		os.Exit(3)
	case "family-middle": // exits, so that its child is an orphan
		child("family-last")
		os.Exit(0)
	}
	fmt.Fprintln(pipe, os.Getpid())
	time.Sleep(time.Hour)
}

// owner is a program that starts a family and never ends by itself.
func owner() {
	d := &Direct{Tag: OwnedTag("ptesto"), DieWithParent: true}
	fmt.Println(d.Tag)
	exe, err := os.Executable()
	if err == nil {
		_, err = d.Spawn(context.Background(), Spec{
			Key: "family", Path: exe, Env: []string{modeVar + "=family", "GORACE=atexit_sleep_ms=0"},
			Files: []*os.File{nil, nil, os.Stderr, os.Stdout},
		})
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	time.Sleep(time.Hour)
}
