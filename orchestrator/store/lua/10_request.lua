-- The life of a request: loading, inbox messages, roles and their load, the ways out of a placement.

local FIELDS = {
  'state', 'epoch', 'tenant', 'prompt_tokens', 'max_tokens', 'prio', 'submitted_ms', 'deadline_ms', 'attempts', 'order',
  'p', 'p_inc', 'p_open', 'p_tokens', 'p_blocks', 'd', 'd_inc', 'd_open', 'd_blocks', 'holder', 'holder_inc',
  'ing', 'ing_epoch', 'ing_addr', 'reason', 'known_n',
  's', 's_inc', 's_blocks', 's_wait_ms',
  'm', 'm_inc', 'm_open', 'm_epoch', 'm_blocks', 'm_known', 'm_why', 'moves',
}

-- The request without its bulky fields (spec, error), or nil.
local function load_request(c, id)
  local values = redis.call('HMGET', k_request(c, id), unpack(FIELDS))
  if not values[1] then return nil end
  local r = {id = id}
  for at, field in ipairs(FIELDS) do r[field] = values[at] or '' end
  return r
end

-- Writes fields of the request and keeps the loaded copy equal.
local function set(c, r, changes)
  local flat = {}
  for field, value in pairs(changes) do
    r[field] = value
    flat[#flat + 1] = field
    flat[#flat + 1] = value
  end
  redis.call('HSET', k_request(c, r.id), unpack(flat))
end

local function journal_length(c, id)
  return redis.call('STRLEN', k_journal(c, id)) / 4
end

-- The first epoch that was never given out.
local function next_epoch(r)
  return text(math.max(tonumber(r.epoch), tonumber(r.m_epoch) or 0) + 1)
end

local function check_move(c, r, state)
  local allowed = MOVES[r.state]
  if not (allowed and allowed[state]) then refuse(c, 'no move from ' .. r.state .. ' to ' .. state) end
end

-- True while that incarnation is the instance's last and has not ended.
local function is_current(c, instance, incarnation)
  local i = redis.call('HMGET', k_instance(c, instance), 'incarnation', 'state')
  return i[1] == incarnation and ALIVE[i[2]] == true
end

-- True when that incarnation is the P (side `p`) or D (side `d`) of the current placement.
local function is_part(r, side, instance, incarnation)
  return r[side] == instance and r[side .. '_inc'] == incarnation
end

-- True while new work may be given to that incarnation.
local function takes_work(c, instance, incarnation)
  local i = redis.call('HMGET', k_instance(c, instance), 'incarnation', 'state', 'want_drain')
  return i[1] == incarnation and i[2] == 'READY' and i[3] ~= '1'
end

-- Inbox. Pushing an equal message again moves it to the end; a message to an ended incarnation is dropped.
local function push(c, instance, incarnation, kind, id, epoch)
  if instance == '' or not is_current(c, instance, incarnation) then return end
  local seq = redis.call('HINCRBY', k_instance(c, instance), 'in_seq', 1)
  redis.call('ZADD', k_inbox(c, instance), seq, kind .. '|' .. id .. '|' .. epoch)
  hint_instance(c, instance)
end

local function push_to_both(c, r, kind)
  push(c, r.p, r.p_inc, kind, r.id, r.epoch)
  if r.d ~= r.p or r.d_inc ~= r.p_inc then push(c, r.d, r.d_inc, kind, r.id, r.epoch) end
end

-- Roles.

local function charge(c, instance, side, requests, blocks, tokens)
  local key = k_instance(c, instance)
  redis.call('HINCRBY', key, side .. '_requests', requests)
  redis.call('HINCRBY', key, side .. '_blocks', blocks)
  if tokens then redis.call('HINCRBY', key, side .. '_tokens', tokens) end
end

-- Opens both roles at the instances that `changes` of assign wrote into r.
local function enter_roles(c, r)
  charge(c, r.p, 'p', 1, r.p_blocks, r.p_tokens)
  charge(c, r.d, 'd', 1, r.d_blocks)
  redis.call('SADD', k_parts(c, r.p, r.p_inc), r.id)
  redis.call('SADD', k_parts(c, r.d, r.d_inc), r.id)
end

local function leave_part(c, r, instance, incarnation)
  local as_p = r.p_open == '1' and r.p == instance and r.p_inc == incarnation
  local as_d = r.d_open == '1' and r.d == instance and r.d_inc == incarnation
  local as_m = r.m_open == '1' and r.m == instance and r.m_inc == incarnation
  if not (as_p or as_d or as_m) then redis.call('SREM', k_parts(c, instance, incarnation), r.id) end
end

local function leave_p(c, r)
  if r.p_open ~= '1' then return end
  charge(c, r.p, 'p', -1, text(-tonumber(r.p_blocks)), text(-tonumber(r.p_tokens)))
  set(c, r, {p_open = '0'})
  leave_part(c, r, r.p, r.p_inc)
end

local function leave_d(c, r)
  if r.d_open ~= '1' then return end
  charge(c, r.d, 'd', -1, text(-tonumber(r.d_blocks)))
  set(c, r, {d_open = '0'})
  leave_part(c, r, r.d, r.d_inc)
end

-- A line of the log of moves, newest first; autan_moves reads it.
local function note_move(c, r, event, note)
  local line = {text(c.now), event, r.id, r.m_epoch, r.d, r.m, r.m_why, note or ''}
  redis.call('LPUSH', k(c, 'moves'), table.concat(line, '|'))
  redis.call('LTRIM', k(c, 'moves'), 0, MOVE_RECORDS - 1)
end

-- Moves that are open, at both ends.
local function count_move(c, r, by)
  redis.call('HINCRBY', k_instance(c, r.d), 'm_out', by)
  redis.call('HINCRBY', k_instance(c, r.m), 'm_in', by)
end

-- Ends an open move without a commit: its target finds a REVOKE at the move's epoch.
local function leave_m(c, r)
  if r.m_open ~= '1' then return end
  push(c, r.m, r.m_inc, 'revoke', r.id, r.m_epoch)
  charge(c, r.m, 'd', -1, text(-tonumber(r.m_blocks)))
  count_move(c, r, -1)
  note_move(c, r, 'stayed')
  count(c, 'migrations_stayed')
  set(c, r, {m_open = '0'})
  leave_part(c, r, r.m, r.m_inc)
end

-- Ownership by an ingress.

local function own(c, id, ingress, epoch)
  redis.call('SADD', k_own(c, ingress, epoch), id)
  redis.call('SADD', k(c, 'owners'), ingress .. '|' .. epoch)
end

local function disown(c, r)
  local key = k_own(c, r.ing, r.ing_epoch)
  redis.call('SREM', key, r.id)
  if redis.call('EXISTS', key) == 0 then redis.call('SREM', k(c, 'owners'), r.ing .. '|' .. r.ing_epoch) end
end

local function owns(r, ingress, epoch)
  return r.ing == ingress and r.ing_epoch == epoch
end

-- Ends a live request. The caller has checked everything; `by_owner` leaves out the hint to the owning ingress.
-- Participants that may still hold it get a REVOKE at the epoch under which they hold it.
local function terminate(c, r, state, reason, retain_ms, stored_error, by_owner)
  check_move(c, r, state)
  if by_owner then
    if r.p_open == '1' then push(c, r.p, r.p_inc, 'revoke', r.id, r.epoch) end
    if r.d_open == '1' and not (r.p_open == '1' and r.p == r.d) then push(c, r.d, r.d_inc, 'revoke', r.id, r.epoch) end
  else
    push_to_both(c, r, 'revoke')
    hint_ingress(c, r.ing, r.id)
  end
  leave_p(c, r)
  leave_d(c, r)
  leave_m(c, r)
  disown(c, r)
  for _, index in ipairs({'ready', 'lease', 'deadline', 'live'}) do redis.call('ZREM', k(c, index), r.id) end
  set(c, r, {
    state = state, reason = reason, error = stored_error or '', holder = '', holder_inc = '', ended_ms = text(c.now),
  })
  redis.call('PEXPIRE', k_request(c, r.id), retain_ms)
  redis.call('PEXPIRE', k_journal(c, r.id), retain_ms)
  count(c, string.lower(state))
  hint_core(c)
end

-- Takes a placed request back into the queue, at the place that its submission gave it. The state alone refuses the old
-- holders until assign raises the epoch. The epoch becomes the last one that was given out, be it to a move that came to
-- nothing: the next placement is signed for the epoch behind the one that is read in the queue.
local function requeue(c, r)
  check_move(c, r, 'QUEUED')
  push_to_both(c, r, 'revoke')
  leave_p(c, r)
  leave_d(c, r)
  leave_m(c, r)
  set(c, r, {
    state = 'QUEUED', epoch = text(tonumber(next_epoch(r)) - 1),
    holder = '', holder_inc = '', p = '', p_inc = '', d = '', d_inc = '',
    p_blocks = '0', p_tokens = '0', d_blocks = '0',
  })
  redis.call('ZREM', k(c, 'lease'), r.id)
  redis.call('ZADD', k(c, 'ready'), r.order, r.id)
  count(c, 'requeued')
  hint_core(c)
  hint_ingress(c, r.ing, r.id)
end

-- Counts an attempt where `counts` says so; the last one ends the request as `last_state`, any other requeues it.
local function retry_or_end(c, r, counts, max_attempts, last_state, reason, retain_ms, stored_error)
  local attempts = tonumber(r.attempts) + (counts and 1 or 0)
  if counts then set(c, r, {attempts = text(attempts)}) end
  if counts and attempts >= max_attempts then
    terminate(c, r, last_state, reason, retain_ms, stored_error)
  else
    requeue(c, r)
  end
end

-- Ends an incarnation: no message reaches it any more, and the next reap requeues what it took part in.
local function end_incarnation(c, instance, incarnation)
  redis.call('UNLINK', k_inbox(c, instance))
  if redis.call('EXISTS', k_parts(c, instance, incarnation)) == 1 then
    redis.call('SADD', k(c, 'sweep'), instance .. '|' .. incarnation)
  end
  hint_core(c)
end
