-- Runs a script of cosocket calls, line by line, and answers one line for each.
-- The first line of the request's body names the peers, key=value.

local function words(line)
    local verb, name, options = nil, nil, {}
    for word in line:gmatch("%S+") do
        local key, value = word:match("^(%w+)=(.*)$")
        if key then
            options[key] = value
        elseif verb then
            name = word
        else
            verb = word
        end
    end
    return verb, name, options
end

ngx.req.read_body()
local lines = {}
for line in ngx.req.get_body_data():gmatch("[^\n]+") do
    lines[#lines + 1] = line
end
local _, _, peers = words(table.remove(lines, 1))

local control = ngx.socket.tcp()
control:settimeout(10000)
assert(control:connect("127.0.0.1", tonumber(peers.control)))

local function ask(command)
    assert(control:send(command .. "\n"))
    return assert(control:receive())
end

-- Some turns of the event loop, here and at the server: all that the last call
-- has set off is then done.
local function settle()
    for _ = 1, 4 do
        ask("nop")
    end
end

-- The reply is received when all of it has come, after what came before it.
local function ping(sock, request, come)
    local ok, err = sock:send(request .. "\n")
    if not ok then
        return err
    end
    come()
    local reply, err = sock:receive()
    return reply or err
end

local names = {}     -- name -> its last connect
local finished = {}  -- names whose connect has ended during this line
local sockets = {}   -- none may be collected before the end

local function connect(name, o)
    local this = { waiting = true }
    names[name] = this
    this.thread = ngx.thread.spawn(function()
        local sock = ngx.socket.tcp()
        sockets[#sockets + 1] = sock
        sock:settimeouts(tonumber(o.timeout) or 10000, 10000, 10000)
        local host, port = "127.0.0.1", tonumber(peers.port)
        if o.to == "refused" then
            port = tonumber(peers.refused)
        elseif o.to == "unreachable" then
            host = "127.255.255.255"
        end
        local ok, err = sock:connect(host, port, {
            pool = o.pool and peers.prefix .. o.pool,
            pool_size = tonumber(o.size),
            backlog = tonumber(o.backlog),
        })
        local result = err
        if ok then
            result = "reused " .. sock:getreusedtimes()
            local reply = ping(sock, "PING", function() end)
            this.number = reply:match("%d+")
            this.sock, this.held = sock, true
            result = result .. " " .. reply
        end
        this.waiting = false
        finished[#finished + 1] = name .. ": " .. result
    end)
end

local function run(verb, name, o)
    local this = names[name] or {}
    if verb == "connect" then
        if this.waiting or this.held then
            return "busy"
        end
        connect(name, o)
        return "connecting"
    elseif verb == "abort" then
        if not this.waiting then
            return "not waiting"
        end
        this.waiting = false
        assert(ngx.thread.kill(this.thread))
        return "aborted"
    elseif verb == "join" then
        while this.waiting do
            ask("nop")
        end
        return "joined"
    elseif verb == "fin" or verb == "rst" or verb == "push" or verb == "await" then
        return this.number and ask(verb .. " " .. this.number) or "no number"
    elseif this.waiting then
        return "waiting"
    elseif not this.sock then
        return "no socket"
    elseif verb == "ping" or verb == "more" then
        return ping(this.sock, verb:upper(), settle)
    end
    local ok, err
    if verb == "close" then
        ok, err = this.sock:close()
    elseif verb == "keepalive" then
        ok, err = this.sock:setkeepalive(tonumber(o.timeout), tonumber(o.size))
    else
        error("unknown verb " .. verb)
    end
    if ok or err == "connection in dubious state" then
        this.held = false
    end
    return ok and "ok" or err
end

for i, line in ipairs(lines) do
    local result = run(words(line))
    settle()
    table.sort(finished)
    result = line .. " -> " .. result
    for _, f in ipairs(finished) do
        result = result .. "; " .. f
    end
    finished = {}
    -- What happens in the time before an awaited event is that event's.
    if not (lines[i + 1] or ""):find("^await") then
        result = result .. " [" .. ask("mark") .. "]"
    end
    ngx.say(result)
end
ngx.exit(ngx.OK)
