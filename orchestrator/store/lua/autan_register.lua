-- autan_register: a worker process announces itself as the next incarnation of an instance.
-- ARGV  instance_id, role (prefill, decode, combined), addr, card
-- Reply OK, incarnation, now_ms
-- Promise: incarnations of one instance only grow, through LOST and STOPPED as well. The former incarnation is fenced at
-- once, its inbox is gone, and the next reap requeues what it took part in (its load stays charged until then).
-- An instance that was asked to drain stays so, unless it stopped in between: a finished drain is over.
-- Allowed on a full store, or a full store could never be emptied after its workers died.
local ROLES = {prefill = true, decode = true, combined = true}

local function autan_register(keys, args)
  local c = open('autan_register', keys, args)
  local instance = take_name(c, 'instance_id')
  local role = take_one_of(c, 'role', ROLES)
  local addr = take_bytes(c, 'addr')
  local card = take_bytes(c, 'card')
  taken_all(c)
  local key = k_instance(c, instance)
  local old = redis.call('HMGET', key, 'incarnation', 'state', 'want_drain')
  local incarnation = text(tonumber(old[1] or '0') + 1)
  mark_generation(c)
  if old[1] then end_incarnation(c, instance, old[1]) end
  local want_drain = (old[3] == '1' and old[2] ~= 'STOPPED') and '1' or '0'
  redis.call('HSET', key, 'role', role, 'addr', addr, 'card', card, 'stats', '', 'incarnation', incarnation,
    'state', 'STARTING', 'beat_ms', text(c.now), 'want_drain', want_drain)
  redis.call('SADD', k(c, 'instances'), instance)
  hint_core(c)
  return {'OK', incarnation, text(c.now)}
end
redis.register_function{function_name = 'autan_register', callback = autan_register, flags = {'allow-oom'}}
