package pool

// Stats is what happened in a worker. A connection ends in exactly one way:
//
//	Dials − DialErrors = Open + Closed + Evicted + Expired + ServerClosed + Unasked + Dubious + Shutdown
type Stats struct {
	Dials      int64 // connection attempts that have ended
	DialErrors int64 // those that failed
	Reuses     int64 // connects that got a kept connection
	Kept       int64 // calls of SetKeepalive that made a connection idle
	Open       int64 // connections that are open, in use or idle

	Closed       int64 // closed by their callers
	Evicted      int64 // idle ones closed because the pool was full
	Expired      int64 // closed after their idle timeout
	ServerClosed int64 // idle ones on which FIN or RST came
	Unasked      int64 // idle ones on which data came
	Dubious      int64 // could not be kept: data had come before
	Shutdown     int64 // closed because the worker ended

	QueueFull    int64 // connects refused because the backlog was full
	Waited       int64 // connects that went into the backlog
	WaitTimeouts int64 // those that stayed there for their whole timeout
	WaitCanceled int64 // those whose context was done before
}
