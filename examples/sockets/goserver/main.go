// Command goserver is a web server that is handed its socket, and that loses no
// request when it is replaced.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	l, err := listener()
	if err != nil {
		return err
	}
	var leaving atomic.Bool
	var open atomic.Int64 // connections
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if leaving.Load() {
				w.Header().Set("Connection", "close")
			}
			time.Sleep(20 * time.Millisecond) // the work
			fmt.Fprintln(w, os.Getpid())
		}),
		ConnState: func(_ net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				open.Add(1)
			case http.StateClosed, http.StateHijacked:
				open.Add(-1)
			}
		},
	}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	left := make(chan struct{})
	go func() {
		defer close(left)
		<-stop.Done()
		// No new connections: those wait in the socket for whoever comes next.
		// Those there are get an answer with "Connection: close" to the request
		// they send next. Shutdown alone would cut the ones that are idle, and
		// with them a request that is on its way.
		leaving.Store(true)
		l.Close()
		for end := time.Now().Add(5 * time.Second); open.Load() > 0 && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		_ = srv.Shutdown(context.Background()) // finishes what is being worked on
	}()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return err
	}
	<-left
	return nil
}

// listener is the first socket that this process was handed; without any, as
// from a shell, one of its own.
func listener() (net.Listener, error) {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return net.Listen("tcp", "127.0.0.1:8080")
	}
	f := os.NewFile(3, os.Getenv("LISTEN_FDNAMES"))
	defer f.Close()
	return net.FileListener(f)
}
