-- autan_fail: an instance that takes part in a request gives up on it.
-- ARGV  id, epoch, instance, incarnation, retryable, poison, max_attempts, retain_ms, error (bytes of StoredError)
-- Reply OK, state after the call | STALE (another epoch, an ended incarnation, or no open role in it) | GONE
-- Promise: not retryable: FAILED. Retryable: an attempt counts and the request is queued again; the max_attempts-th makes
-- it DEAD when poison, else FAILED. Repeated after the reply was lost it changes nothing and tells the state.
local function autan_fail(keys, args)
  local c = open('autan_fail', keys, args)
  local id = take_name(c, 'id')
  local epoch = take_epoch(c, 'epoch')
  local instance = take_name(c, 'instance')
  local incarnation = take_epoch(c, 'incarnation')
  local retryable = take_flag(c, 'retryable')
  local poison = take_flag(c, 'poison')
  local max_attempts = take_int(c, 'max_attempts', 1)
  local retain_ms = take_int(c, 'retain_ms', 1)
  local stored_error = take_bytes(c, 'error')
  taken_all(c)
  local r = load_request(c, id)
  if not r then return {'GONE'} end
  if r.epoch ~= epoch or not is_current(c, instance, incarnation) then return stale(c) end
  if not PLACED[r.state] then return {'OK', r.state} end
  local as_p = r.p_open == '1' and is_part(r, 'p', instance, incarnation)
  local as_d = r.d_open == '1' and is_part(r, 'd', instance, incarnation)
  if not (as_p or as_d) then return stale(c) end
  if retryable then
    local last, reason = 'FAILED', 'error'
    if poison then last, reason = 'DEAD', 'poison' end
    retry_or_end(c, r, true, max_attempts, last, reason, retain_ms, stored_error)
  else
    terminate(c, r, 'FAILED', 'error', retain_ms, stored_error)
  end
  return {'OK', r.state}
end
redis.register_function{function_name = 'autan_fail', callback = autan_fail, flags = {'allow-oom'}}
