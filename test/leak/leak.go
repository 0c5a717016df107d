// Package leak counts the descriptors of a test's process, for tests that hold
// every one that is left against what they test.
//
// It must never import anything of the program.
package leak

import (
	"os"
	"testing"
	"time"
)

// Descriptors is how many the process has, the one for counting included.
func Descriptors(t testing.TB) int {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(dir)
}

// Settled waits until the process has n descriptors again, and fails the test
// where it does not come to that.
func Settled(t testing.TB, n int) {
	t.Helper()
	now := 0
	for range 1000 {
		if now = Descriptors(t); now <= n {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d descriptors, %d before", now, n)
}
