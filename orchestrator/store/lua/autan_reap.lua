-- autan_reap: the leader ends what ran out of time: deadlines, incarnations without a beat, leases.
-- ARGV  leader_id, leader_epoch, limit (at most 1000), max_attempts, lost_ms, retain_ms
-- Reply OK, now_ms, k, k x (id, state: QUEUED, DEAD or EXPIRED), m, m x (instance that became LOST) | NOT_LEADER
-- Promise: at most `limit` requests change per call, the rest in the next ones. A request that was held (PREFILLING or
-- DECODING) by what ended counts an attempt; the max_attempts-th makes it DEAD. A request that only waited there
-- does not, unless its holder ended as well.
-- Whoever calls it has to wait after the store was away: its clock went on while nobody could renew.
local function reap_instances(c, lost_ms, lost)
  for _, instance in ipairs(redis.call('SMEMBERS', k(c, 'instances'))) do
    local key = k_instance(c, instance)
    local i = redis.call('HMGET', key, 'state', 'beat_ms', 'incarnation')
    local age_ms = c.now - tonumber(i[2])
    if ALIVE[i[1]] and age_ms < 0 then
      redis.call('HSET', key, 'beat_ms', text(c.now))  -- the server's clock went back
    elseif ALIVE[i[1]] and age_ms >= lost_ms then
      redis.call('HSET', key, 'state', 'LOST')
      end_incarnation(c, instance, i[3])
      count(c, 'lost')
      lost[#lost + 1] = instance
    end
  end
end

local function autan_reap(keys, args)
  local c = open('autan_reap', keys, args)
  local leader = take_name(c, 'leader_id')
  local leader_epoch = take_epoch(c, 'leader_epoch')
  local limit = take_int(c, 'limit', 0, 1000)
  local max_attempts = take_int(c, 'max_attempts', 1)
  local lost_ms = take_int(c, 'lost_ms', 0)
  local retain_ms = take_int(c, 'retain_ms', 1)
  taken_all(c)
  if not leads(c, leader, leader_epoch) then return {'NOT_LEADER'} end
  local left, outcomes, lost = limit, {}, {}

  local function note(r)
    left = left - 1
    outcomes[#outcomes + 1] = r.id
    outcomes[#outcomes + 1] = r.state
  end
  local function overdue(index)
    return left > 0 and redis.call('ZRANGEBYSCORE', k(c, index), '-inf', text(c.now), 'LIMIT', 0, left) or {}
  end
  local function give_up(r, held)
    retry_or_end(c, r, held, max_attempts, 'DEAD', 'poison', retain_ms)
    note(r)
  end

  for _, id in ipairs(overdue('deadline')) do
    local r = load_request(c, id)
    terminate(c, r, 'EXPIRED', 'deadline', retain_ms)
    note(r)
  end
  reap_instances(c, lost_ms, lost)
  for _, ended in ipairs(redis.call('SMEMBERS', k(c, 'sweep'))) do
    local instance, incarnation = string.match(ended, '^(.*)|(%d+)$')
    local parts = k_parts(c, instance, incarnation)
    for _, id in ipairs(left > 0 and redis.call('SRANDMEMBER', parts, left) or {}) do
      local r = load_request(c, id)
      local as_d = r.d_open == '1' and is_part(r, 'd', instance, incarnation)
      if r.m_open == '1' and is_part(r, 'm', instance, incarnation) and not as_d then
        -- Only the target of a move ended: the request decodes on where it is.
        leave_m(c, r)
        push(c, r.d, r.d_inc, 'stay', id, r.m_epoch)
      else
        give_up(r, HELD[r.state] and not is_current(c, r.holder, r.holder_inc))
      end
    end
    if redis.call('EXISTS', parts) == 0 then redis.call('SREM', k(c, 'sweep'), ended) end
  end
  for _, id in ipairs(overdue('lease')) do
    local r = load_request(c, id)
    give_up(r, HELD[r.state])
  end

  local reply = {'OK', text(c.now), #outcomes / 2}
  for _, value in ipairs(outcomes) do reply[#reply + 1] = value end
  reply[#reply + 1] = #lost
  for _, instance in ipairs(lost) do reply[#reply + 1] = instance end
  return reply
end
redis.register_function{function_name = 'autan_reap', callback = autan_reap, flags = {'allow-oom'}}
