package cluster

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/remuda-dev/remuda/internal/nodeipc"
)

// BenchmarkPolicies tells what the two ways to spread connections cost: the
// latency of a request over a new connection, and the share of the worker that
// got most (0.5 would be even). `go test -bench Policies ./internal/cluster`.
func BenchmarkPolicies(b *testing.B) {
	for name, policy := range map[string]Policy{"shared": Shared, "rr": RoundRobin} {
		for _, clients := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s-%d", name, clients), func(b *testing.B) {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					b.Fatal(err)
				}
				addr := l.Addr().String()
				l.Close()
				_, port, _ := net.SplitHostPort(addr)
				p, err := NewPrimary(Options{Policy: policy})
				if err != nil {
					b.Fatal(err)
				}
				defer p.Close()
				for id := range 2 {
					mine, theirs, err := nodeipc.Pair()
					if err != nil {
						b.Fatal(err)
					}
					cmd := exec.Command("node", filepath.Join("testdata", "http.js"), port)
					cmd.ExtraFiles = []*os.File{theirs}
					cmd.Env = append(p.Env(id, os.Environ()), nodeipc.Env(3)...)
					if err := cmd.Start(); err != nil {
						b.Fatal(err)
					}
					theirs.Close()
					defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
					w, err := p.Attach(id, mine, Handlers{}, false)
					if err != nil {
						b.Fatal(err)
					}
					<-w.Listening()
				}
				var mu sync.Mutex
				var took []time.Duration
				by := map[string]int{}
				var wg sync.WaitGroup
				b.ResetTimer()
				for n := range clients {
					wg.Add(1)
					go func() {
						defer wg.Done()
						for i := n; i < b.N; i += clients {
							began := time.Now()
							pid, err := once(addr)
							if err != nil {
								b.Error(err)
								return
							}
							mu.Lock()
							took = append(took, time.Since(began))
							by[pid]++
							mu.Unlock()
						}
					}()
				}
				wg.Wait()
				b.StopTimer()
				if len(took) == 0 {
					return
				}
				slices.Sort(took)
				most := 0
				for _, n := range by {
					most = max(most, n)
				}
				b.ReportMetric(float64(most)/float64(len(took)), "share")
				b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
				b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			})
		}
	}
}

// once is a request over a connection of its own.
func once(addr string) (string, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}
