package ipc

import (
	"testing"
	"time"
)

// What is kept back goes out with the next answers, with as many again, or when
// no answer comes.
func TestGather(t *testing.T) {
	fired := make(chan struct{}, 1)
	now := time.Unix(1, 0)
	g := gather{flush: func() { fired <- struct{}{} }}
	quick := func(pending int) {
		g.turned(pending, now)
		now = now.Add(gatherPace / 2)
		g.turned(pending, now)
	}
	quick(0)
	for n := 1; n <= gatherFrom; n++ {
		if g.keep(n) {
			t.Fatalf("task %d is kept back from a worker that has little to do", n)
		}
	}
	kept := 0
	for n := gatherFrom + 1; g.keep(n); n++ {
		kept++
	}
	if kept != gatherFrom-1 || g.kept != 0 {
		t.Errorf("%d tasks were kept back, %d are", kept, g.kept)
	}
	quick(20)
	if !g.keep(21) {
		t.Error("a task is not kept back from a busy worker")
	}
	<-fired
	g.waited()
	if g.keep(22) {
		t.Error("a task is kept back from a worker that gives no answers")
	}
}

// A worker that stops answering gets the tasks that were kept back from it.
func TestKeptBackTasksArrive(t *testing.T) {
	a, b := pair(t)
	conn, err := NewFrames(a, Options{Concurrency: 64})
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewChannel(b, ChannelOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	served, ready := make(chan error, 1), make(chan struct{})
	go func() { served <- conn.Serve(func() { close(ready) }) }()
	if err := w.SendHello(Hello{}); err != nil {
		t.Fatal(err)
	}
	<-ready
	e := newEnds()
	var ids []uint32
	tasks := func(n int) {
		for range n {
			if err := conn.Start(&Request{Body: []byte("1"), To: e}); err != nil {
				t.Fatal(err)
			}
		}
		for n > 0 {
			f, _, _, err := w.Receive()
			if err != nil {
				t.Fatal(err)
			}
			if f.Type == TypeTask {
				ids = append(ids, f.ID)
				n--
			}
		}
	}
	tasks(40)
	for range 5 { // in the end no answer comes; what was started last does
		for _, id := range ids[:8] {
			if err := w.SendResult(id, nil, Answer{}); err != nil {
				t.Fatal(err)
			}
		}
		ids = ids[8:]
		tasks(3)
	}
	conn.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
