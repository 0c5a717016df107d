package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/nodeipc"
)

// defaultReplyWait is how long a reply is waited for where nothing is said.
const defaultReplyWait = 5 * time.Second

// Message implements [api.Daemon].
func (d *Daemon) Message(ctx context.Context, req client.MessageRequest) (client.ActResult, error) {
	if err := nodeipc.Check(req.Message); err != nil {
		return client.ActResult{}, refuse(http.StatusUnprocessableEntity, "the message cannot be sent: %v", err)
	}
	chosen, err := d.chosen(req.Targets)
	if err != nil {
		return client.ActResult{}, err
	}
	wait := time.Duration(req.WaitMS) * time.Millisecond
	if wait == 0 {
		wait = defaultReplyWait
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	out := d.outcomes(chosen)
	var all sync.WaitGroup
	for n, i := range chosen {
		st, _ := i.sup.Status(i.name)
		r, ok := st.Run.(*run)
		switch {
		case !ok || r == nil:
			out[n].Error = "does not run"
			continue
		case r.ipc == nil:
			out[n].Error = "takes no messages: it is no program of Node"
			continue
		}
		got := r.replies.expect(req.Reply)
		if err := r.ipc.Send(req.Message); err != nil {
			r.replies.forget(got)
			out[n].Error = "the message was not sent: " + err.Error()
			if errors.Is(err, nodeipc.ErrClosed) {
				out[n].Error = "takes no messages any more: it has closed its channel"
			}
			continue
		}
		if req.Reply == "" {
			continue
		}
		all.Go(func() {
			defer r.replies.forget(got)
			select {
			case out[n].Reply = <-got:
			case <-r.Done():
				out[n].Error = "ended and did not reply"
			case <-ctx.Done():
				out[n].Error = "did not reply within " + wait.String()
			}
		})
	}
	all.Wait()
	return client.ActResult{Instances: out}, nil
}

// message takes what the program sent.
func (r *run) message(m json.RawMessage) {
	if string(m) == `"ready"` {
		tell(r.ipcReady)
		return
	}
	r.replies.take(m)
}

// replies are what a program answers to messages, as @pm2/io does. The zero
// value waits for none.
type replies struct {
	mu      sync.Mutex
	waiting []expected // in order
}

type expected struct {
	action string
	to     chan json.RawMessage
}

// expect waits for a reply to an action, which the channel gets; nil where
// action is "".
func (w *replies) expect(action string) chan json.RawMessage {
	if action == "" {
		return nil
	}
	to := make(chan json.RawMessage, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = append(w.waiting, expected{action, to})
	return to
}

func (w *replies) forget(to chan json.RawMessage) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting = slices.DeleteFunc(w.waiting, func(e expected) bool { return e.to == to })
}

// take gives a reply to whoever has waited longest for it.
func (w *replies) take(m json.RawMessage) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.waiting) == 0 || !bytes.Contains(m, []byte("axm:reply")) {
		return
	}
	var reply struct {
		Type string `json:"type"`
		Data struct {
			Action string          `json:"action_name"`
			Return json.RawMessage `json:"return"`
		} `json:"data"`
	}
	if json.Unmarshal(m, &reply) != nil || reply.Type != "axm:reply" {
		return
	}
	n := slices.IndexFunc(w.waiting, func(e expected) bool { return e.action == reply.Data.Action })
	if n < 0 {
		return
	}
	if len(reply.Data.Return) == 0 { // undefined
		reply.Data.Return = json.RawMessage("null")
	}
	w.waiting[n].to <- reply.Data.Return
	w.waiting = slices.Delete(w.waiting, n, n+1)
}
