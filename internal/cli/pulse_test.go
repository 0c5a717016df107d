package cli

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/client"
)

func TestSilentDaemon(t *testing.T) {
	f := newFake(t, instance(0, "web", 0, client.Online))
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	f.on("/v1/instances", hang)
	c := &cli{Options: Options{Stderr: io.Discard}, client: client.New(f.home)}
	defer c.client.Close()
	list := func(ctx context.Context) error {
		_, err := c.client.List(ctx)
		return err
	}

	// A daemon that is slow but says who it is gets all the time there is.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := c.guarded(ctx, time.Millisecond, time.Minute, list); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a slow daemon: %v", err)
	}

	f.on("/v1/info", hang)
	err := c.guarded(t.Context(), time.Millisecond, 20*time.Millisecond, list)
	var own *ExitError
	if !errors.As(err, &own) || own.Code != ExitUnreachable || !strings.Contains(err.Error(), "has not answered for 20ms") ||
		!strings.Contains(err.Error(), "kill -9 "+strconv.Itoa(os.Getpid())) {
		t.Errorf("a silent daemon: %v", err)
	}

	// A follower is told, and goes on.
	var said strings.Builder
	c.Stderr = &said
	c.following.Store(true)
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := c.guarded(ctx, time.Millisecond, 20*time.Millisecond, list); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a follower: %v", err)
	}
	if n := strings.Count(said.String(), "has not answered"); n != 1 {
		t.Errorf("said %d times: %s", n, said.String())
	}
}
