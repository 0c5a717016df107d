package daemon

import (
	"net/http"
	"time"
)

// quietFor is how long nothing must have happened before the controller gives
// back the memory that the last burst of work needed. It is done once a burst;
// an idle daemon does nothing.
const quietFor = 2 * time.Second

// noticing marks each request as something that happened.
func (d *Daemon) noticing(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.quiet.Reset(quietFor)
		next.ServeHTTP(w, r)
		d.quiet.Reset(quietFor)
	})
}
