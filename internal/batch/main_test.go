package batch

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/remuda-dev/remuda/pool"
)

// childVar makes the test binary a run of tasks, which tests kill.
const childVar = "BATCH_TEST_RUN"

// childRun is what such a run does.
type childRun struct {
	Command   []string
	Protocol  pool.Protocol
	Size      int
	Exec      bool
	Unordered bool
	Log       string
	Results   string // "": standard output
	Sync      bool
}

func TestMain(m *testing.M) {
	if text := os.Getenv(childVar); text != "" {
		var c childRun
		err := json.Unmarshal([]byte(text), &c)
		if err == nil {
			err = c.run()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// Most properties here start processes.
	if err := flag.Set("rapid.checks", "25"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

func (c *childRun) run() error {
	o := Options{
		Pool:  pool.Options{Command: c.Command, Protocol: c.Protocol, Size: c.Size},
		Input: os.Stdin, Output: os.Stdout, Results: os.Stdout, Unordered: c.Unordered, Sync: c.Sync,
	}
	if c.Exec {
		t, err := NewTemplate(c.Command)
		if err != nil {
			return err
		}
		o.Template, o.Format = t, Raw
	}
	if c.Results != "" {
		f, err := os.OpenFile(c.Results, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		o.Output, o.Results = f, f
	}
	l, err := OpenLog(c.Log, true, o.Results)
	if err != nil {
		return err
	}
	defer l.Close()
	o.Log = l
	_, err = Run(context.Background(), o)
	return err
}

func newReader(b []byte) *bufio.Reader { return bufio.NewReaderSize(bytes.NewReader(b), 16) }
